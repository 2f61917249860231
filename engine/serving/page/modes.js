// One mode's neighbours: those of the query as it is, and what became of those of the unchanged one.

import { element } from "./dom.js";
import { neighbour, picture, small } from "./tiles.js";
import { MODES, agrees, className, count, number, ordinal, seconds } from "./words.js";

export const SHOWN = 10;
const MORE = 20;

export class ModeView {
  constructor(mode) {
    this.mode = mode;
    this.shown = SHOWN;
    this.facts = element("p", { class: "faint facts" });
    this.stayed = element("p", { class: "stayed" });
    this.body = element("div", { class: "found" });
    this.controls = element("div", { class: "controls" });
    this.section = element(
      "section",
      { class: "card mode", id: `mode-${mode}`, "aria-labelledby": `title-${mode}` },
      element(
        "div",
        { class: "titled" },
        element("h2", { id: `title-${mode}` }, mode),
        element("p", { class: "faint meaning" }, MODES[mode] ?? ""),
        this.facts,
        this.stayed,
      ),
      this.controls,
      this.body,
    );
  }

  /** While an answer is awaited: what was shown stays, fainter; where nothing was, empty tiles. */
  wait(text = "") {
    this.section.setAttribute("aria-busy", "true");
    if (!this.body.querySelector(".hits")) {
      const tiles = Array.from({ length: SHOWN }, () => element("li", {}, element("span", { class: "frame" })));
      this.body.replaceChildren(element("ol", { class: "hits empty", "aria-hidden": "true" }, tiles));
    }
    if (text) this.facts.textContent = text;
  }

  fail(text) {
    this.section.removeAttribute("aria-busy");
    this.facts.textContent = this.stayed.textContent = "";
    this.body.replaceChildren(element("p", { class: "error", role: "alert" }, text));
  }

  clear() {
    this.section.removeAttribute("aria-busy");
    this.shown = SHOWN;
    this.facts.textContent = this.stayed.textContent = "";
    this.body.replaceChildren();
  }

  /** An answer; `clean` is that of the unchanged query, the same where nothing is changed. */
  show(place, clean, now, usual) {
    this.section.removeAttribute("aria-busy");
    const before = new Set(clean.hits.slice(0, SHOWN).map((hit) => hit.id));
    const hits = now.hits.slice(0, this.shown);
    const meaning = now.score_meaning;
    const made = (hit, more = {}) => neighbour(place, hit, { same: agrees(hit, clean), usual, meaning, ...more });
    const tiles = hits.map((hit) => made(hit, { isNew: now !== clean && !before.has(hit.id) && hit.rank < SHOWN }));
    tiles.push(...this.#beyond(clean, now, hits, made));
    this.#tell(clean, now);
    const list = element("ol", { class: "hits" }, tiles);
    const scrolled = this.body.querySelector(".hits:not(.empty)")?.scrollLeft ?? 0;
    const notes = now.notes.filter((note) => !note.startsWith("recognised as"));
    this.body.replaceChildren(
      element("ul", { class: "notes" }, notes.map((note) => element("li", {}, note))),
      this.#recognised(place, now),
      this.#triggers(now),
      list,
      this.#gone(place, clean, now),
      element("div", { class: "under" }, this.#more(place, clean, now, usual), details(now)),
    );
    list.scrollLeft = scrolled;
  }

  /** Once the pictures of the neighbours are there. */
  seen() {
    return Promise.allSettled([...this.body.querySelectorAll(".hits img")].map((image) => image.decode()));
  }

  /** How many of the unchanged query's neighbours are still there. */
  static staying(clean, now) {
    const ids = new Set(now.hits.slice(0, SHOWN).map((hit) => hit.id));
    const before = clean.hits.slice(0, SHOWN);
    return { stayed: before.filter((hit) => ids.has(hit.id)).length, of: before.length };
  }

  #tell(clean, now) {
    const first = now.hits.slice(0, SHOWN);
    const same = first.filter((hit) => agrees(hit, clean)).length;
    const taken = Object.values(now.timings).reduce((sum, each) => sum + each, 0);
    const whole = same === now.hits.length || now.hits.some((hit) => !agrees(hit, clean));
    const all = whole ? "" : `, as all of the first ${now.hits.length}`;
    const scored = now.scored < now.exemplars ? ` · ${count(now.scored, "exemplar")} scored` : "";
    this.facts.textContent = `${same} of ${first.length} in class ${className(clean)}${all}${scored} · ${seconds(taken)}`;
    this.stayed.replaceChildren();
    if (now !== clean) this.stayed.append(bar(ModeView.staying(clean, now)));
  }

  /** The first neighbour of another class, where it is none of those that are shown. */
  #beyond(clean, now, hits, made) {
    if (hits.some((hit) => !agrees(hit, clean))) return [];
    const other = now.hits.find((hit) => !agrees(hit, clean));
    if (!other) return [];
    const tile = made(other, { caption: `${ordinal(other.rank + 1)}, the first of another class` });
    tile.classList.add("beyond");
    return [tile];
  }

  #recognised(place, now) {
    const id = now.recognised_as;
    const itself = id === now.query && now.hits[0]?.id === id && !place.changed;
    if (id === null || itself) return element("p", { hidden: true });
    return element(
      "p",
      { class: "recognised" },
      picture(place, id, ""),
      element(
        "span",
        {},
        id === now.query ? "still recognised as itself, " : "recognised as a copy of ",
        element("a", { href: place.addressOf(id), "data-id": id }, id),
        ": ranked by what is like that exemplar",
      ),
    );
  }

  #triggers({ pictures }) {
    const shown = pictures?.trigger ? ["query", "trigger", "triggered"] : [];
    const said = {
      query: "query",
      trigger: "trigger; mid-grey is no change",
      triggered: "triggered: what is searched with",
    };
    return element(
      "div",
      { class: "triggers", hidden: !shown.length },
      shown.map((name) =>
        element(
          "figure",
          {},
          element("img", { src: pictures[name], alt: "" }),
          element("figcaption", {}, said[name]),
        ),
      ),
    );
  }

  /** Neighbours of the unchanged query that are among the first no more, and where they are now. */
  #gone(place, clean, now) {
    const ranks = new Map(now.hits.map((hit) => [hit.id, hit.rank]));
    const gone = now === clean ? [] : clean.hits.slice(0, SHOWN).filter((hit) => !(ranks.get(hit.id) < SHOWN));
    const [near, far] = [gone.filter((hit) => ranks.has(hit.id)), gone.filter((hit) => !ranks.has(hit.id))];
    const list = (name, hits, text) =>
      hits.length > 0 && [element("h3", {}, name), element("ul", {}, hits.map((hit) => small(place, hit.id, text(hit))))];
    return element(
      "div",
      { class: "gone", hidden: !gone.length },
      list("Further down now", near, (hit) => ordinal(ranks.get(hit.id) + 1)),
      list(`Not among the first ${now.hits.length} any more`, far, (hit) => hit.class_name),
    );
  }

  #more(place, clean, now, usual) {
    const left = now.hits.length - this.shown;
    if (left <= 0) return null;
    const show = () => {
      this.shown += MORE;
      this.show(place, clean, now, usual);
      this.body.querySelectorAll(".hits > li > a")[this.shown - MORE]?.focus();
    };
    return element("button", { type: "button", class: "plain", onclick: show }, `${Math.min(left, MORE)} more`);
  }
}

/** How many stayed, as squares and in words. */
export function bar({ stayed, of }, short = false) {
  const squares = Array.from({ length: of }, (_, place) => element("i", { class: place < stayed ? "full" : "" }));
  return element(
    "span",
    { class: "bar" },
    element("span", { class: "squares", "aria-hidden": "true" }, squares),
    `${stayed} of ${of}${short ? "" : " stayed"}`,
  );
}

/** The numbers, with what they mean. */
function details(result) {
  const own = result.confidence_meaning;
  const heads = ["", "exemplar", "label", "predicted", result.score_meaning, ...(own ? [own] : [])];
  const rows = result.hits.slice(0, SHOWN).map((hit) => {
    const about = Object.entries(hit.metadata).map(([name, value]) => `${name}: ${value}`);
    const cells = [hit.rank + 1, [hit.id, ...about].join(" · "), hit.class_name, hit.predicted_class, number(hit.score)];
    if (own) cells.push(hit.confidence === null ? "" : number(hit.confidence));
    return element("tr", {}, cells.map((cell) => element("td", {}, String(cell))));
  });
  const taken = Object.entries(result.timings).map(([step, value]) => `${step} ${seconds(value)}`);
  return element(
    "details",
    {},
    element("summary", {}, "Numbers"),
    element(
      "div",
      { class: "scrolled", tabIndex: 0, role: "region", "aria-label": `Numbers of ${result.mode}` },
      element(
        "table",
        {},
        element("thead", {}, element("tr", {}, heads.map((head) => (head ? element("th", { scope: "col" }, head) : element("td", {}))))),
        element("tbody", {}, rows),
      ),
    ),
    element("p", { class: "faint" }, `Larger scores are nearer; compare them within a mode only. Time: ${taken.join(", ")}. ${result.backend}.`),
  );
}
