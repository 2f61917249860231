"""Findings of single images: likely wrong labels, foreign images, images that the model is least sure of."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from jaxtyping import Float64, Int64

from tmm_engine.auditing.discovery import Tail, adjusted, likely
from tmm_engine.auditing.findings import SUSPICIOUS, Finding, Found, Kind, Rule
from tmm_engine.auditing.foreign import strangeness
from tmm_engine.auditing.material import Material
from tmm_engine.auditing.opinions import Opinions
from tmm_engine.index.descriptors.columns import COPY_FEATURE, ROBUST_FEATURE

EVEN = 0.5


def find_wrong_labels(material: Material) -> Found:
    """A finding's score is the probability that its label is wrong."""
    opinions, given, rate = material.opinions, material.given, material.options.rate
    if opinions is None:
        return Found()
    threshold = min(1.0, likely(opinions.wrong[given], rate=rate))
    text = (
        f"no more than {rate:.0%} of the findings are expected to be right labels; of all labels "
        f"{opinions.share:.1%} are estimated to be wrong"
    )
    rows = np.flatnonzero(given & (opinions.wrong >= threshold))
    scores = np.where(given, opinions.wrong, np.nan)

    def about(row: int) -> Finding:
        return _wrong_label(material, row, opinions)

    return Found(
        [about(row) for row in rows.tolist()],
        Rule(text, threshold, int(given.sum())),
        scores,
        _suspicious(about, rows, scores),
    )


def _wrong_label(material: Material, row: int, opinions: Opinions) -> Finding:
    neighbours = material.graph(ROBUST_FEATURE).rows[row]
    heard = neighbours[material.given[neighbours]]
    same = int((material.store.labels[heard] == material.store.labels[row]).sum())
    sees = material.names[material.predicted[row]]
    why = (
        f"{same} of its {len(heard)} nearest have the label {material.name(row)}; the model sees {sees} "
        f"({material.confidence(row):.0%})"
    )
    shown = material.nearest(row, ROBUST_FEATURE)
    finding = material.finding(Kind.LABELS, opinions.wrong[row], row, why, shown)
    best = int(opinions.numbers[opinions.probabilities[row].argmax()])
    return finding if best == material.store.labels[row] else replace(finding, suggestion=material.names[best])


def find_foreign(material: Material) -> Found:
    """A finding's score is 1 − the share of false findings among those as strange."""
    if material.too_few("foreign"):
        return Found()
    graph, rate = material.graph(COPY_FEATURE), material.options.rate
    statistic = strangeness(material.energy, graph)
    scores = 1 - adjusted(Tail.fit(statistic, normal=True).chance(statistic))
    usual = max(float(np.median(graph.distances[:, -1])), 1e-9)

    def about(row: int) -> Finding:
        far = graph.distances[row, -1] / usual
        known = "nothing like it, nor like what it resembles" if scores[row] >= 1 - rate else "little like it"
        why = f"the model knows {known}; its {graph.k}th nearest is {far:.1f} times as far as usual"
        return material.finding(Kind.FOREIGN, scores[row], row, why, material.nearest(row, COPY_FEATURE))

    rows = np.flatnonzero(scores >= 1 - rate)
    text = f"no more than {rate:.0%} of the findings are expected to be as strange as some of the usual images are"
    return Found(
        [about(row) for row in rows.tolist()], material.rule(text), statistic, _suspicious(about, rows, statistic)
    )


def find_unsure(material: Material) -> Found:
    """A finding's score is 1 − the probability of its likeliest label."""
    opinions = material.opinions
    if opinions is None:
        probabilities, numbers, who = (
            material.probabilities,
            np.arange(material.probabilities.shape[1]),
            "the model gives",
        )
    else:
        probabilities, numbers, who = opinions.probabilities, opinions.numbers, "model and neighbours together give"
    scores = 1 - probabilities.max(axis=1)

    def about(row: int) -> Finding:
        best = np.argsort(-probabilities[row], kind="stable")[:2]
        why = " or ".join(f"{material.names[numbers[place]]} ({probabilities[row, place]:.0%})" for place in best)
        return material.finding(Kind.UNSURE, scores[row], row, f"{why}?", material.nearest(row, ROBUST_FEATURE))

    rows, rule = np.flatnonzero(scores > EVEN), Rule(f"{who} no label more than {EVEN:.0%}", EVEN, len(scores))
    return Found([about(row) for row in rows.tolist()], rule, scores, _suspicious(about, rows, scores))


def _suspicious(
    about: Callable[[int], Finding], found: Int64[np.ndarray, "f"], statistic: Float64[np.ndarray, "n"]
) -> list[Finding]:
    """Where nothing is found the likeliest, which are no findings."""
    if len(found):
        return []
    likeliest = np.argsort(-statistic, kind="stable")[:SUSPICIOUS]  # NaN last
    return [about(row) for row in likeliest[~np.isnan(statistic[likeliest])].tolist()]
