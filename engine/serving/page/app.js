// What is shown follows from the page's address and history: a collection, a query, a filter, changes.

import * as address from "./address.js";
import * as api from "./api.js";
import { AuditView } from "./audit.js";
import { Changes } from "./changes.js";
import { complain, element, find, say } from "./dom.js";
import { askForKey, guarded } from "./guarded.js";
import { ModeView, SHOWN } from "./modes.js";
import { installPicking, offerExemplars } from "./picking.js";
import { TmmView } from "./tmm.js";
import { offerReasons, showReasons } from "./why.js";
import { ALIKE, MODES, ORDER, agrees, className, count } from "./words.js";

const ASKED = 100; // neighbours, of which the first are shown: the first of another class may come late
const WANTED = { k: ASKED, pictures: true };

const uploads = new Map(); // what was dropped, by number: history has the number
const views = new Map(); // by mode
const state = {
  collections: [],
  about: null, // of the collection
  usual: Promise.resolve({}), // scores, by mode
  query: null, // {id} or {file, upload}
  where: "",
  changes: address.UNCHANGED,
  clean: new Map(), // answers to the unchanged query, by mode
  asking: new AbortController(),
};
const changes = new Changes((values) => {
  state.changes = values;
  views.get("tmm")?.outdate();
  changes.forget("tmm");
  history.replaceState(history.state, "", here());
  search();
});

const audit = new AuditView(
  () => place(),
  (job) => go(address.write({ collection: state.about.name, audit: job })),
);

/** Of what is shown, or with other parts. */
const here = (other = {}) =>
  address.write({
    collection: state.about?.name,
    id: state.query?.id ?? null,
    where: state.where,
    changes: state.changes,
    ...other,
  });

/** Where exemplars are, for tiles. */
const place = () => ({
  collection: state.about.name,
  shape: state.about.facts.image_shape,
  changed: address.isChanged(state.changes),
  addressOf: (id) => here({ id, changes: address.UNCHANGED }),
});

let turn = 0; // of what is shown: who comes late from one before changes nothing

/** Show what an address and its history ask for. */
async function follow(url, kept) {
  const own = ++turn;
  const asked = address.read(new URL(url, location).search);
  const name = asked.collection ?? state.collections[0].name;
  const upload = kept?.upload;
  const known = upload === undefined || uploads.has(upload);
  if (state.about?.name !== name && !(await open(name, () => own === turn))) return;
  audit.leave();
  if (asked.audit !== null) {
    state.query = null;
    state.where = "";
    show();
    turnTo("audit");
    document.title = `Audit · ${name} · tmm-engine`;
    await audit.show(asked.audit);
    return;
  }
  state.query = asked.id !== null ? { id: asked.id } : uploads.has(upload) ? { file: uploads.get(upload), upload } : null;
  state.where = asked.where;
  state.changes = asked.changes;
  show();
  if (!known) complain("start-error", "The picture that was searched with is gone: drop it again.");
}

/** Go to another address, as a link does. */
function go(url, kept = null) {
  history.pushState(kept, "", url);
  return follow(url, kept);
}

/** Learn what there is to a collection; whether it is still `wanted` once that is known. */
async function open(name, wanted) {
  state.asking.abort();
  views.get("tmm")?.leave();
  state.about = null;
  find("exemplars").replaceChildren();
  try {
    const about = await guarded(() => api.collection(name));
    if (!wanted()) return false;
    state.about = about;
  } catch (error) {
    if (!wanted()) return false;
    turnTo("start");
    complain("start-error", `${error.message}.`);
    return false;
  }
  state.usual = guarded(() => api.likeness(name)).then((found) => found.modes, () => ({}));
  const { about } = state;
  find("collection").value = name;
  find("collection-name").textContent = name;
  find("collection-facts").textContent = `${count(about.exemplars, "exemplar")}, version ${about.version}`;
  changes.side = Math.min(...about.facts.image_shape.slice(1));
  const [first] = about.facts.classes;
  const columns = ["id", "label", "predicted", ...about.metadata];
  find("where-help").textContent = `SQL over ${columns.join(", ")}, such as label = '${first}' AND predicted <> '${first}'`;
  if (about.trouble) say(`The newest version could not be opened: ${about.trouble}`);
  layOut(about);
  refill();
  return true;
}

/** A row for each mode of a collection. */
function layOut(about) {
  views.clear();
  for (const mode of ORDER.filter((each) => about.modes.includes(each))) {
    views.set(mode, mode === "tmm" ? new TmmView(answer) : new ModeView(mode));
  }
  views.get("tmm")?.offer(about);
  find("modes").replaceChildren(...[...views.values()].map((view) => view.section));
  find("order").replaceChildren(
    ...[...views.keys()].map((mode) => element("div", {}, element("dt", {}, mode), element("dd", {}, MODES[mode]))),
  );
  find("words").replaceChildren(
    ...ALIKE.flatMap(([words, meaning]) => [element("dt", {}, words), element("dd", {}, meaning)]),
  );
}

/** Offer other exemplars. */
function refill() {
  const { about } = state;
  const wanted = () => state.about === about;
  return guarded(() => offerExemplars(place(), about.exemplars, wanted)).catch((error) => wanted() && say(error.message));
}

function turnTo(name) {
  const asked = name === "query";
  find("main").dataset.view = name;
  find("loading").hidden = true;
  find("start").hidden = name !== "start";
  find("audit").hidden = name !== "audit";
  find("to-audit").hidden = !state.about;
  for (const id of ["query", "filter", "modes", "legend"]) find(id).hidden = !asked;
  find("picker").hidden = !state.about || name === "audit";
  find("order").hidden = name !== "start" || !state.about;
  find("picker-title").textContent = asked ? "Another that is known" : "Or begin with one that is known";
  if (!asked) find("why").hidden = true;
}

/** Everything anew, for the query, filter and changes of the state. */
function show() {
  state.clean.clear();
  changes.values = state.changes;
  find("where").value = state.where;
  find("unfilter").hidden = !state.where;
  for (const id of ["start-error", "where-error", "query-error"]) complain(id);
  const { query, about } = state;
  document.title = `${query ? `${query.id ?? query.file.name} · ` : ""}${about.name} · tmm-engine`;
  turnTo(query ? "query" : "start");
  find("why").hidden = true;
  for (const view of views.values()) view.clear();
  views.get("tmm")?.outdate();
  if (query) {
    showQuery(query);
    search();
  } else state.asking.abort();
}

/** The query, before anything is known of it. */
function showQuery(query) {
  const image = find("query-picture");
  find("query-name").textContent = query.id ?? query.file.name;
  find("query-classes").replaceChildren();
  image.classList.toggle("large", Math.max(...state.about.facts.image_shape.slice(1)) > 96);
  image.alt = `Query ${query.id ?? query.file.name}`;
  if (query.id !== undefined) api.showExemplar(image, state.about.name, query.id);
  else {
    image.src = URL.createObjectURL(query.file);
    image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
  }
}

/** What the model makes of the query, and the query as the model sees it. */
function tellQuery(clean, now) {
  find("query-picture").src = now.pictures.query;
  find("query-picture").alt = `Query ${now.query} as the model sees it`;
  const facts = clean.true_class === null ? [] : [["label", clean.true_class]];
  facts.push(["predicted", now.predicted_class]);
  if (now.predicted_label !== clean.predicted_label) facts.push(["before", clean.predicted_class]);
  find("query-classes").replaceChildren(
    ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
  );
}

/** Ask in all quick modes: the first alone, so that it is there the sooner. */
async function search() {
  if (!state.query) return;
  state.asking.abort();
  state.asking = new AbortController();
  const { signal } = state.asking;
  const [first, ...rest] = [...views.values()].filter((view) => view.mode !== "tmm");
  for (const view of [first, ...rest]) view.wait();
  try {
    if (state.where && !(await filtered(signal))) return;
    const found = await answer(first, {}, signal, (error) => {
      for (const view of views.values()) view.clear();
      complain("query-error", `${error.message}.`);
    });
    if (!found || signal.aborted) return;
    if (find("why").hidden) offerReasons(found.clean, first.mode);
    await first.seen(); // before the other modes take the server's time
    if (signal.aborted) return;
    const others = await Promise.all(rest.map((view) => answer(view, {}, signal)));
    if (!signal.aborted) announce([found, ...others].filter(Boolean));
  } catch (error) {
    if (!signal.aborted) throw error;
  }
}

/** Whether there is anything to search with the filter; says how much, or what is wrong with it. */
async function filtered(signal) {
  const { about, where } = state;
  try {
    const total = await guarded(() => api.matching(about.name, where), { signal });
    find("where-help").textContent = `${count(total, "exemplar")} of ${about.exemplars.toLocaleString("en")} match.`;
    return !signal.aborted;
  } catch (error) {
    if (signal.aborted) return false;
    complain("where-error", `${error.message}.`);
  }
  for (const view of views.values()) view.clear();
  return false;
}

/** One mode's answer on the page, once it is there; what came of it, or null. */
async function answer(view, options, signal, refused = (error) => view.fail(`${error.message}.`)) {
  const { about, query, where } = state;
  const wanted = { ...WANTED, mode: view.mode, where, ...options };
  const ask = (own) =>
    guarded(() => api.search(about.name, query, own, signal), { signal, busy: (text) => view.wait(text) });
  const key = `${view.mode} ${JSON.stringify(options)}`;
  try {
    if (!state.clean.has(key)) state.clean.set(key, await ask(wanted));
    const clean = state.clean.get(key);
    const now = address.isChanged(state.changes) ? await ask({ ...wanted, ...state.changes }) : clean;
    const usual = (await state.usual)[view.mode];
    if (signal.aborted) return null;
    if (view.mode !== "tmm") tellQuery(clean, now);
    view.show(place(), clean, now, usual);
    if (now !== clean) changes.tellStayed(view.mode, ModeView.staying(clean, now));
    return { view, clean, now };
  } catch (error) {
    if (signal.aborted) return null;
    if (!(error instanceof api.Problem)) throw error;
    refused(error);
    return null;
  }
}

function announce(found) {
  const told = found.map(({ view, clean, now }) => {
    if (now !== clean) {
      const { stayed, of } = ModeView.staying(clean, now);
      return `${view.mode}: ${stayed} of ${of} stayed`;
    }
    const first = now.hits.slice(0, SHOWN);
    return `${view.mode}: ${first.filter((hit) => agrees(hit, clean)).length} of ${first.length} in class ${className(clean)}`;
  });
  say(told.join("; "));
}

async function explain() {
  const [view] = views.values();
  const { signal } = state.asking;
  const button = find("explain");
  button.disabled = true;
  button.textContent = "Looking …";
  const options = { k: SHOWN, mode: view.mode, where: state.where, explain: true };
  try {
    const result = await guarded(() => api.search(state.about.name, state.query, options), { signal });
    if (signal.aborted) return;
    showReasons(place(), result, (await state.usual)[view.mode]);
    button.hidden = true;
    find("why").focus();
  } catch (error) {
    if (signal.aborted) return;
    find("reasons").replaceChildren(element("p", { class: "error", role: "alert" }, `${error.message}.`));
  } finally {
    button.disabled = false;
    button.textContent = "Say why";
  }
}

async function picked(file, more) {
  await ready;
  const upload = uploads.size;
  uploads.set(upload, file);
  await go(here({ id: null, changes: address.UNCHANGED }), { upload });
  if (more) say(`${count(more, "other picture")} left out: one at a time.`);
  scrollTo({ top: 0 });
}

function refused(text) {
  complain(state.query ? "query-error" : "start-error", text);
}

function listen() {
  installPicking(picked, refused);
  addEventListener("popstate", (event) => follow(location, event.state));
  document.addEventListener("click", (event) => {
    if (event.target.closest(".skip")) {
      event.preventDefault();
      find("answers").focus();
      return;
    }
    const link = event.target.closest("a[data-id], #home, #to-audit");
    if (!link || event.button || event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    const bare = { id: null, where: "", changes: address.UNCHANGED };
    const own = { home: here(bare), "to-audit": here({ ...bare, audit: "" }) };
    go(own[link.id] ?? link.href);
    (link.id ? link : find("query-name")).focus({ preventScroll: true });
    scrollTo({ top: 0 });
  });
  find("collection").addEventListener("change", (event) => go(address.write({ collection: event.target.value })));
  const filter = (where) => go(here({ where }), history.state);
  find("filter").addEventListener("submit", (event) => {
    event.preventDefault();
    filter(find("where").value.trim());
  });
  find("unfilter").addEventListener("click", () => {
    filter("");
    find("where").focus();
  });
  find("others").addEventListener("click", refill);
  find("explain").addEventListener("click", explain);
  find("key").addEventListener("click", async () => {
    await askForKey("another is wanted");
    follow(location, history.state);
  });
}

async function begin() {
  listen();
  find("key").hidden = !api.key.get();
  state.collections = await guarded(api.collections);
  const many = state.collections.length > 1;
  find("collection").hidden = !many;
  find("collection-name").hidden = many;
  find("collection").replaceChildren(...state.collections.map(({ name }) => element("option", { value: name }, name)));
  await follow(location, history.state);
}

const ready = begin();
