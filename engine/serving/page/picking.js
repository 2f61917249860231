// A picture to search with: dropped, pasted, chosen from a file, or one of a few exemplars.

import * as api from "./api.js";
import { element, find } from "./dom.js";
import { picture } from "./tiles.js";

const OFFERED = 12;

/** `picked` is told a file, `refused` why what came is none. */
export function installPicking(picked, refused) {
  const file = find("file");
  for (const button of document.querySelectorAll("[data-choose]")) {
    button.addEventListener("click", () => file.click());
  }
  file.addEventListener("change", () => {
    if (file.files.length) take(file.files);
    file.value = "";
  });
  addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) take(event.clipboardData.files);
    else if (!event.target.closest?.("input")) refused("Expected a picture in the clipboard, got none: copy one first.");
  });
  let inside = 0;
  const carries = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => {
    if (carries(event)) find("dropping").hidden = ++inside === 0;
  });
  addEventListener("dragleave", (event) => {
    if (carries(event)) find("dropping").hidden = --inside <= 0;
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    inside = 0;
    find("dropping").hidden = true;
    if (event.dataTransfer.files.length) take(event.dataTransfer.files);
    else refused("Expected a picture file, got something else: save the picture first, then drop its file.");
  });

  function take(files) {
    const pictures = [...files].filter((each) => each.type.startsWith("image/") || !each.type);
    if (!pictures.length) refused(`Expected a picture, got ${files[0].name} (${files[0].type}).`);
    else picked(pictures[0], files.length - 1);
  }
}

/** A few exemplars, spread over all; shown where they are still `wanted`. */
export async function offerExemplars(place, total, wanted) {
  const number = Math.min(OFFERED, total);
  const offset = Math.random();
  const starts = Array.from({ length: number }, (_, turn) => Math.floor((total * (turn + offset)) / number));
  const found = await Promise.all(starts.map((start) => api.exemplarAt(place.collection, start)));
  const tiles = found.filter(Boolean).map((exemplar) =>
    element(
      "li",
      {},
      element(
        "a",
        { href: place.addressOf(exemplar.id), title: exemplar.id, "data-id": exemplar.id },
        element("span", { class: "frame" }, picture(place, exemplar.id, "")),
        element("span", { class: "class cut" }, exemplar.class_name),
        element("span", { class: "unseen" }, exemplar.id),
      ),
    ),
  );
  if (wanted()) find("exemplars").replaceChildren(...tiles);
}
