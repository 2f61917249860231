// What is wrong with a collection: looked for as a job, gone through one by one, by keyboard too, and taken away as files.

import * as api from "./api.js";
import { complain, element, find, say } from "./dom.js";
import { guarded } from "./guarded.js";
import { picture } from "./tiles.js";
import { count } from "./words.js";

const LOOK = 500; // milliseconds between two looks at how far the job is
const KINDS = {
  duplicates: ["Near-duplicates", "Keep the first picture, delete the others, unless they are meant to be there."],
  leaks: ["Leaks", "A picture that is in both makes a test look better than it is: delete it from one."],
  labels: ["Likely wrong labels", "Compare the picture with its neighbours. If the suggestion is right, relabel it."],
  foreign: ["Foreign images", "Delete what does not belong here. Some may just be unusual."],
  unsure: ["Images the model is least sure of", "Nothing need be wrong: these are worth a second look."],
};

export class AuditView {
  /** `place` says where exemplars are; `begun` is told the job that looks. */
  constructor(place, begun) {
    this.place = place;
    find("audit-begin").addEventListener("click", () => this.#begin(begun));
    find("audit-kind").addEventListener("change", () => this.#go(0));
    find("audit-back").addEventListener("click", () => this.#go(this.at - 1));
    find("audit-next").addEventListener("click", () => this.#go(this.at + 1));
    find("audit-right").addEventListener("click", () => this.#decide("act on it"));
    find("audit-leave").addEventListener("click", () => this.#decide("leave it"));
    for (const name of ["findings.jsonl", "delete.txt", "relabel.csv"]) {
      find(`export-${name}`).addEventListener("click", () => this.#export(name));
    }
    const keys = { ArrowRight: "next", ArrowLeft: "back", y: "right", n: "leave" };
    find("audit").addEventListener("keydown", (event) => {
      const button = keys[event.key] && find(`audit-${keys[event.key]}`);
      if (!button || event.altKey || event.ctrlKey || event.metaKey || event.target.matches("select")) return;
      if (find("audit-found").hidden) return;
      event.preventDefault();
      button.click();
    });
  }

  /** What a job found, or the offer to look. */
  async show(job) {
    this.leave();
    this.watching = new AbortController();
    const { signal } = this.watching;
    complain("audit-error");
    find("audit-found").hidden = true;
    find("audit-begin").hidden = Boolean(job);
    find("audit-progress").hidden = !job;
    if (!job) return;
    try {
      const result = await this.#result(job, signal);
      if (!signal.aborted) this.#present(result);
    } catch (error) {
      if (signal.aborted) return;
      complain("audit-error", `${error.message}.`);
      find("audit-begin").hidden = false;
    } finally {
      if (!signal.aborted) find("audit-progress").hidden = true;
    }
  }

  leave() {
    this.watching?.abort();
  }

  async #begin(begun) {
    complain("audit-error");
    try {
      const { id } = await guarded(() => api.audit(this.place().collection));
      begun(id);
    } catch (error) {
      complain("audit-error", `${error.message}.`);
    }
  }

  async #result(id, signal) {
    for (;;) {
      const job = await guarded(() => api.job(id), { signal });
      signal.throwIfAborted();
      if (job.state === "done") return job.result;
      if (job.error) throw new Error(job.error);
      if (job.ended) throw new Error("the audit was cancelled");
      const bar = find("audit-bar");
      if (job.total) Object.assign(bar, { max: job.total, value: job.done });
      else bar.removeAttribute("value");
      find("audit-step").textContent = job.step ? `${job.step} …` : `${job.state} …`;
      await new Promise((resolve) => setTimeout(resolve, LOOK));
    }
  }

  #present(result) {
    this.findings = result.findings.map((finding) => ({ ...finding, decision: null }));
    const of = (kind) => this.findings.filter((finding) => finding.kind === kind).length;
    const options = Object.entries(KINDS).filter(([kind]) => kind in result.rules);
    find("audit-kind").replaceChildren(
      element("option", { value: "" }, `everything: ${this.findings.length}`),
      ...options.map(([kind, [title]]) => element("option", { value: kind }, `${title}: ${of(kind)}`)),
    );
    this.rules = result.rules;
    const notes = [`${count(result.exemplars, "image")} were looked at. Nothing was changed.`, ...result.notes];
    find("audit-notes").replaceChildren(...notes.map((note) => element("li", {}, note)));
    find("audit-found").hidden = false;
    say(`${count(this.findings.length, "finding")}`);
    this.#go(0);
    find("audit-finding").focus();
  }

  get chosen() {
    const kind = find("audit-kind").value;
    return this.findings.filter((finding) => !kind || finding.kind === kind);
  }

  #go(at) {
    const { chosen } = this;
    this.at = Math.max(0, Math.min(at, chosen.length - 1));
    const finding = chosen[this.at];
    for (const [id, off] of [
      ["back", this.at === 0],
      ["next", this.at >= chosen.length - 1],
      ["right", !finding],
      ["leave", !finding],
    ]) {
      find(`audit-${id}`).disabled = off;
    }
    find("audit-at").textContent = chosen.length ? `${this.at + 1} of ${chosen.length}` : "none";
    find("audit-finding").replaceChildren(finding ? this.#told(finding) : this.#nothing());
    this.#tellDecided(finding);
  }

  #nothing() {
    const kind = find("audit-kind").value;
    const rule = kind ? `: ${this.rules[kind].text}` : "";
    return element("p", { class: "faint" }, `Nothing was found by the rule${rule}.`);
  }

  #told(finding) {
    const [title, doing] = KINDS[finding.kind];
    const sure = { labels: "likely to be wrong", unsure: "unsure" }[finding.kind] ?? "sure";
    const change = finding.suggestion ? ` → ${finding.suggestion}?` : "";
    const alike = (each) => `${each.source ? `${each.source}, ` : ""}alike ${each.similarity.toFixed(2)} of 1`;
    return element(
      "div",
      { class: "finding" },
      element(
        "div",
        {},
        element("h3", {}, title),
        element("p", {}, element("b", {}, finding.label + change)),
        element("p", {}, element("b", { class: "score" }, `${(100 * finding.score).toFixed(1)} %`), ` ${sure}`),
        element("p", { class: "faint" }, finding.why),
        !finding.label_given && element("p", { class: "faint" }, "It has no label of its own; shown is what the model predicts."),
        element("p", {}, doing),
      ),
      element(
        "ul",
        { class: "tiles" },
        this.#tile(finding, finding.kind === "duplicates" ? "the first" : "the picture in question", "it"),
        finding.evidence.map((each) => this.#tile(each, alike(each), "")),
      ),
    );
  }

  #tile(each, line, mark) {
    const place = this.place();
    return element(
      "li",
      { class: mark },
      element(
        "a",
        { href: place.addressOf(each.id), "data-id": each.id, title: each.id },
        element("span", { class: "frame" }, picture(place, each.id, "")),
        element("span", { class: "class cut" }, each.label),
        each.predicted !== each.label && element("span", { class: "faint said" }, `predicted ${each.predicted}`),
        element("span", { class: "faint said" }, line),
      ),
    );
  }

  #decide(decision) {
    const finding = this.chosen[this.at];
    finding.decision = finding.decision === decision ? null : decision;
    if (finding.decision && this.at < this.chosen.length - 1) this.#go(this.at + 1);
    else this.#tellDecided(finding);
    say(`${finding.id}: ${finding.decision ?? "undecided"}`);
  }

  #tellDecided(finding) {
    find("audit-right").setAttribute("aria-pressed", String(finding?.decision === "act on it"));
    find("audit-leave").setAttribute("aria-pressed", String(finding?.decision === "leave it"));
    const { deleted, relabelled } = this.#decided;
    find("audit-decided").textContent =
      `${count(this.findings.filter((each) => each.decision).length, "finding")} decided: ` +
      `${deleted.length} to delete, ${relabelled.length} to relabel.`;
    find("export-delete.txt").disabled = !deleted.length;
    find("export-relabel.csv").disabled = !relabelled.length;
  }

  /** What follows from the findings that are to be acted on. */
  get #decided() {
    const acted = this.findings.filter((finding) => finding.decision === "act on it");
    const deleted = acted.flatMap((finding) => {
      if (finding.kind === "duplicates") return finding.evidence.map((each) => each.id);
      return ["leaks", "foreign"].includes(finding.kind) ? [finding.id] : [];
    });
    const relabelled = acted.filter((finding) => finding.kind === "labels" && finding.suggestion);
    return { deleted: [...new Set(deleted)], relabelled };
  }

  #export(name) {
    const { deleted, relabelled } = this.#decided;
    const quoted = (value) => `"${String(value).replaceAll('"', '""')}"`;
    const rows = relabelled.map((each) => [each.id, each.suggestion, each.label, each.score.toFixed(3)]);
    const content = {
      "findings.jsonl": () => this.findings.map((finding) => `${JSON.stringify(finding)}\n`),
      "delete.txt": () => deleted.map((id) => `${id}\n`),
      "relabel.csv": () => [["id", "label", "was", "score"], ...rows].map((row) => `${row.map(quoted).join(",")}\n`),
    }[name]();
    const address = URL.createObjectURL(new Blob(content, { type: "text/plain" }));
    element("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  }
}
