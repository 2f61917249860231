// What modes, scores and numbers are called.

export const ORDER = ["robust", "cosine", "l2", "tmm"];

export const MODES = {
  robust: "by descriptors that hold under noise",
  cosine: "by the angle between features",
  l2: "by the distance between features",
  tmm: "TMM-NN: by how strongly exemplars answer to the query’s trigger",
};

export const ALIKE = [
  ["most alike", "nearer than nine tenths of this collection’s pictures are to the one nearest to them"],
  ["very alike", "nearer than half of them are"],
  ["alike", "nearer than a tenth of them are"],
  ["a bit alike", "nearer than any two of its pictures usually are"],
  ["hardly alike", "as far as any two of its pictures"],
];

const OF_CONFIDENCE = [0.9, 0.6, 0.3, 0.1];

/** How much alike, 0 the most, and in words; null where nothing is known to compare with. */
export function howAlike(hit, usual) {
  const limits = hit.confidence === null ? usual && [usual.high, usual.usual, usual.low, usual.any_two] : OF_CONFIDENCE;
  if (!limits) return null;
  const value = hit.confidence ?? hit.score;
  const place = limits.findIndex((limit) => value >= limit);
  const level = place < 0 ? limits.length : place;
  return { level, words: ALIKE[level][0] };
}

/** Whether a neighbour has the class: the query’s own label where it is known, else the one predicted for it. */
export function agrees(hit, query) {
  if (query.true_label !== null) return hit.label === query.true_label;
  return (hit.label_is_class ? hit.label : hit.predicted_label) === query.predicted_label;
}

export const className = (query) => query.true_class ?? query.predicted_class;

export const number = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4 });

export const count = (value, noun, nouns = `${noun}s`) => `${value.toLocaleString("en")} ${value === 1 ? noun : nouns}`;

export const seconds = (value) => (value >= 1 ? `${value.toFixed(1)} s` : `${Math.round(value * 1000)} ms`);

export function ordinal(value) {
  const ends = { one: "st", two: "nd", few: "rd", other: "th" };
  return `${value}${ends[new Intl.PluralRules("en", { type: "ordinal" }).select(value)]}`;
}
