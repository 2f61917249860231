// Elements of text and elements; nothing of what the server says becomes HTML.

export const find = (id) => document.getElementById(id);

/** An element; properties that are none of its own are attributes; children that are null or false are left out. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [property, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (property in made && property !== "list") made[property] = value;
    else made.setAttribute(property, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** Told to who listens instead of looking. */
export function say(text) {
  find("status").textContent = text;
}

/** An error beside what it is about; nothing: none. */
export function complain(id, text) {
  const place = find(id);
  place.textContent = text ?? "";
  if (place.classList.contains("card")) place.hidden = !text;
}
