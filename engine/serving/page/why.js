// Why the model decides so: examples and counter-examples, when they are asked for.

import { element, find } from "./dom.js";
import { neighbour } from "./tiles.js";
import { agrees } from "./words.js";

/** Title, meaning and exemplars of each kind, as on the pages that the command line writes. */
const kinds = (told) => [
  [`Nearest that are not ${told.class_name}`, "the likeliest other answer, if these look closer", told.unlike],
  [
    "Typical of each",
    `in the middle of all ${told.class_name}, and of all of the nearest other class`,
    told.prototypes,
  ],
  [
    `Pulled towards ${told.class_name}`,
    `training on these makes the model surest that it is ${told.class_name}`,
    told.pulled_towards,
  ],
  [`Pulled away from ${told.class_name}`, "training on these makes it least sure", told.pulled_away],
];

/** What an explanation says. */
export function showReasons(place, result, usual) {
  const told = result.explanation;
  const groups = kinds(told).filter(([, , hits]) => hits.length);
  find("reasons").replaceChildren(
    element("ul", { class: "notes" }, told.notes.map((note) => element("li", {}, note))),
    element(
      "div",
      { class: "kinds" },
      groups.map(([title, meaning, hits], group) =>
        element(
          "section",
          {},
          element("h3", {}, title),
          element("p", { class: "faint" }, meaning),
          element(
            "ol",
            { class: "hits" },
            hits.map((hit) => {
              const scored = group < 2; // of the others the score is an influence, which says nothing of likeness
              const meaning = scored ? result.score_meaning : "influence (TracIn, last layer)";
              return neighbour(place, hit, { same: agrees(hit, result), usual: scored ? usual : null, meaning });
            }),
          ),
        ),
      ),
    ),
  );
}

/** Before it is asked for. */
export function offerReasons(query, mode) {
  find("why").hidden = false;
  find("why-title").textContent = `Why ${query.predicted_class}?`;
  find("why-meaning").textContent =
    `The nearest of another class, what is typical, and what the model learnt it from; by ${mode}.`;
  find("reasons").replaceChildren();
  find("explain").hidden = false;
  find("explain").disabled = false;
}
