// Mode tmm takes its time: it is asked for by hand, says how long it has been at it, and can be left.

import { element } from "./dom.js";
import { ModeView } from "./modes.js";
import { count } from "./words.js";

const CANDIDATES = 200;

export class TmmView extends ModeView {
  /** `ask` searches with options of mode tmm, until a signal says to leave it. */
  constructor(ask) {
    super("tmm");
    this.select = element("select", { id: "preset" });
    this.button = element("button", { type: "submit" }, "Search by tmm");
    this.stop = element("button", { type: "button", class: "plain", hidden: true }, "Leave it");
    this.progress = element("progress", { hidden: true, "aria-label": "Searching by tmm" });
    this.said = element("span", { class: "faint" });
    const form = element(
      "form",
      { class: "asking" },
      element("label", { for: "preset" }, "How"),
      this.select,
      this.button,
      this.stop,
      this.progress,
      this.said,
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#search(ask);
    });
    this.stop.addEventListener("click", () => this.leave());
    this.controls.append(form);
  }

  /** For a collection: what can be asked for there. */
  offer(about) {
    const near = Math.min(CANDIDATES, about.exemplars);
    const ways = [
      [{ candidates: near }, `the ${count(near, "nearest exemplar")}, some seconds`],
      [{}, `all ${count(about.exemplars, "exemplar")}, slow`],
    ];
    if ("global_feature" in about.facts.columns) ways.unshift([{ preset: "fast" }, "fast: one trigger for all"]);
    this.ways = ways.map(([options]) => options);
    this.select.replaceChildren(...ways.map(([, text], place) => element("option", { value: place }, text)));
  }

  /** The query is another: what was found belongs to the one before. */
  outdate() {
    this.leave();
    this.clear();
  }

  leave() {
    this.controller?.abort();
  }

  async #search(ask) {
    this.leave();
    this.controller = new AbortController();
    const { signal } = this.controller;
    const began = performance.now();
    const tell = () => (this.said.textContent = `for ${Math.round((performance.now() - began) / 1000)} s`);
    const timer = setInterval(tell, 1000);
    this.#busy(true);
    this.wait();
    try {
      await ask(this, this.ways[Number(this.select.value)], signal);
    } finally {
      clearInterval(timer);
      this.#busy(false);
      if (signal.aborted) this.clear();
    }
  }

  #busy(busy) {
    this.button.disabled = busy;
    this.stop.hidden = this.progress.hidden = !busy;
    this.said.textContent = "";
  }
}
