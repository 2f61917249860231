// Exemplars as tiles: each a link that searches by it.

import { showExemplar } from "./api.js";
import { element } from "./dom.js";
import { ALIKE, howAlike, number } from "./words.js";

const LARGE = 96; // pixels from which on a picture is reduced rather than enlarged
const THUMBNAIL = 224;

/** The picture of an exemplar; small ones keep their pixels square. */
export function picture(place, id, alt) {
  const [, height, width] = place.shape;
  const large = Math.max(width, height) > LARGE;
  const image = element("img", { alt, width, height, decoding: "async", class: large ? "large" : null });
  showExemplar(image, place.collection, id, large ? THUMBNAIL : null);
  image.addEventListener("error", () => image.classList.add("missing"), { once: true });
  return image;
}

/** A neighbour: {same, usual, isNew, caption} say how it stands to the query. */
export function neighbour(place, hit, { same, usual, meaning, isNew = false, caption = null }) {
  const alike = howAlike(hit, usual);
  const alt = `Neighbour ${hit.rank + 1}, ${same ? "the query’s" : "another"} class${isNew ? ", new" : ""}:`;
  const title = `${hit.id}\n${number(hit.score)}: ${meaning}${hit.confidence === null ? "" : `\n${number(hit.confidence)} alike`}`;
  return element(
    "li",
    { class: `${same ? "same" : "other"}${isNew ? " new" : ""}` },
    element(
      "a",
      { href: place.addressOf(hit.id), title, "data-id": hit.id },
      element(
        "span",
        { class: "frame" },
        picture(place, hit.id, alt),
        element("span", { class: "mark", "aria-hidden": "true" }, same ? "✓" : "✗"),
      ),
      element("span", { class: "class cut" }, hit.class_name),
      hit.label_is_predicted && element("span", { class: "tag" }, "predicted"),
      isNew && element("span", { class: "tag new", "aria-hidden": "true" }, "new"),
      alike && likeness(alike),
      hit.predicted_class !== hit.class_name &&
        element("span", { class: "faint said" }, `predicted ${hit.predicted_class}`),
      caption && element("span", { class: "faint" }, caption),
    ),
  );
}

/** A small picture with a line of text. */
export function small(place, id, text) {
  return element(
    "li",
    {},
    element("a", { href: place.addressOf(id), title: id, "data-id": id }, picture(place, id, ""), element("span", { class: "cut" }, text)),
  );
}

/** In words, and as a bar that is full where nothing could be more alike. */
function likeness({ level, words }) {
  return element(
    "span",
    { class: "alike" },
    element("meter", { min: 0, max: ALIKE.length, value: ALIKE.length - level, "aria-hidden": "true" }),
    words,
  );
}
