// The server, asked. An error has the problem's own words; whoever asks shows them.

const KEY = "api-key";

export class Problem extends Error {
  constructor(status, detail, seconds = null) {
    super(detail);
    this.status = status;
    this.seconds = seconds; // after which to ask again
  }
}

export class Offline extends Error {}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
};

/** The response to a request, with the key; a Problem or Offline otherwise. */
async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key.get()) {
    if (!/^[\x21-\x7e]+$/.test(key.get())) {
      throw new Problem(401, "A key has letters, digits and signs, without spaces.");
    }
    headers.set(KEY, key.get());
  }
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Offline();
  }
  if (response.ok) return response;
  const seconds = Number(response.headers.get("Retry-After")) || null;
  const said = await response.json().catch(() => ({}));
  throw new Problem(response.status, said.detail ?? response.statusText, seconds);
}

const json = async (...request) => (await ask(...request)).json();

const path = (collection, rest = "") => `collections/${encodeURIComponent(collection)}${rest}`;

export const alive = () => ask("livez", { cache: "no-store" });
export const collections = async () => (await json("collections")).collections;
export const collection = (name) => json(path(name));
export const likeness = (name) => json(path(name, "/likeness"));

export const job = (id) => json(`jobs/${encodeURIComponent(id)}`);

/** A job that looks for what is wrong with a collection. */
export const audit = (name) =>
  json(path(name, "/audit"), { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" });

/** One exemplar, at a place in the order in which they are stored. */
export async function exemplarAt(name, start) {
  const found = await json(path(name, `/exemplars?limit=1&start=${start}`));
  return found.exemplars[0];
}

/** How many exemplars a filter leaves. */
export async function matching(name, where) {
  return (await json(path(name, `/exemplars?limit=1&where=${encodeURIComponent(where)}`))).total;
}

/** The answer to one query: {id} of an exemplar or {file}; options as the server's. */
export async function search(name, query, options, signal) {
  const form = new FormData();
  if (query.file) form.append("image", query.file, query.file.name || "picture");
  else form.append("id", query.id);
  for (const [option, value] of Object.entries(options)) {
    if (value !== null && value !== "" && value !== false && value !== 0) form.append(option, value);
  }
  const found = await json(path(name, "/search"), { method: "POST", body: form, signal });
  return found.results[0];
}

/** Let an <img> show an exemplar; where there is a key it cannot ask for itself. */
export function showExemplar(image, name, id, side) {
  const address = path(name, `/images/${encodeURIComponent(id.toWellFormed())}${side ? `?size=${side}` : ""}`);
  if (!key.get()) {
    image.src = address;
    return;
  }
  ask(address)
    .then((response) => response.blob())
    .then((content) => {
      image.src = URL.createObjectURL(content);
      image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
    })
    .catch(() => image.removeAttribute("src"));
}
