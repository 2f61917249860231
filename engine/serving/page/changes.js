// The sliders: by how much the query is changed.

import { UNCHANGED, isChanged } from "./address.js";
import { element, find } from "./dom.js";
import { bar } from "./modes.js";
import { ORDER } from "./words.js";

const PAUSE = 150; // milliseconds without a movement, before it is searched for

/** In words, for pictures of a height and width. */
const SAID = {
  darken: (value) => (value ? `to ${Math.round(100 * (1 - value))} % of its light` : "not at all"),
  blur: (value, side) => (value ? `over ${(value * side).toFixed(1)} pixels` : "none"),
  noise: (value) => (value ? `σ ${Math.round(100 * value)} % of black to white` : "none"),
};

export class Changes {
  /** `moved` is told the changes, once the sliders rest. */
  constructor(moved) {
    this.side = 1;
    let timer;
    find("changes").addEventListener("input", () => {
      this.tell();
      clearTimeout(timer);
      timer = setTimeout(() => moved(this.values), PAUSE);
    });
    find("changes").addEventListener("reset", (event) => {
      event.preventDefault();
      clearTimeout(timer);
      this.values = UNCHANGED;
      find("darken").focus();
      moved(this.values);
    });
    find("changes").addEventListener("submit", (event) => event.preventDefault());
  }

  get values() {
    return Object.fromEntries(Object.keys(UNCHANGED).map((name) => [name, Number(find(name).value)]));
  }

  set values(values) {
    for (const [name, value] of Object.entries(values)) find(name).value = value;
    this.tell();
  }

  tell() {
    for (const [name, value] of Object.entries(this.values)) {
      const said = SAID[name](value, this.side);
      find(`${name}-said`).textContent = said;
      find(name).setAttribute("aria-valuetext", said);
    }
    find("reset").hidden = !isChanged(this.values);
    if (!isChanged(this.values)) find("stayed").replaceChildren();
  }

  /** What was said of a mode is of another picture. */
  forget(mode) {
    find("stayed").querySelector(`[data-mode="${mode}"]`)?.remove();
  }

  /** How many stayed in a mode. */
  tellStayed(mode, staying) {
    const line = element("li", { "data-mode": mode }, element("b", {}, mode), bar(staying, true));
    const known = find("stayed").querySelector(`[data-mode="${mode}"]`);
    if (known) known.replaceWith(line);
    else find("stayed").append(line);
    const order = (each) => ORDER.indexOf(each.dataset.mode);
    find("stayed").replaceChildren(...[...find("stayed").children].sort((one, other) => order(one) - order(other)));
  }
}
