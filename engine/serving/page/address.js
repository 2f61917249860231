// What is shown, as the page's address has it: a collection, an exemplar, a filter, changes; or an audit, by its job.

export const UNCHANGED = { darken: 0, blur: 0, noise: 0 };

/** Of an address; a picture that was dropped is none of it. */
export function read(search = location.search) {
  const found = new URLSearchParams(search);
  const changes = Object.fromEntries(
    Object.keys(UNCHANGED).map((name) => [name, Math.max(0, Number(found.get(name)) || 0)]),
  );
  const [collection, id, audit] = ["collection", "id", "audit"].map((name) => found.get(name));
  return { collection, id, audit, where: found.get("where") ?? "", changes };
}

/** The address of what is to be shown. */
export function write({ collection, id = null, audit = null, where = "", changes = UNCHANGED }) {
  const said = new URLSearchParams();
  if (collection) said.set("collection", collection);
  if (id !== null) said.set("id", id);
  if (audit !== null) said.set("audit", audit);
  if (where) said.set("where", where);
  for (const [name, value] of Object.entries(changes)) if (value) said.set(name, value);
  return `?${said}`;
}

export const isChanged = (changes) => Object.values(changes).some(Boolean);
