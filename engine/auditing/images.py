"""Findings of single images: likely wrong labels, foreign images, images that the model is least sure of."""

from dataclasses import replace

import numpy as np

from tmm_engine.auditing.discovery import Tail, adjusted, likely
from tmm_engine.auditing.findings import Finding, Found, Kind, Rule
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
    findings = [_wrong_label(material, int(row), opinions) for row in rows]
    scores = np.where(given, opinions.wrong, np.nan)
    return Found(findings, Rule(text, threshold, int(given.sum())), scores)


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
    findings = []
    for row in np.flatnonzero(scores >= 1 - rate).tolist():
        far = graph.distances[row, -1] / usual
        why = (
            f"the model knows nothing like it, nor like what it resembles; its {graph.k}th nearest is {far:.1f} times "
            f"as far as usual"
        )
        findings.append(material.finding(Kind.FOREIGN, scores[row], row, why, material.nearest(row, COPY_FEATURE)))
    text = f"no more than {rate:.0%} of the findings are expected to be as strange as some of the usual images are"
    return Found(findings, material.rule(text), statistic)


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
    findings = []
    for row in np.flatnonzero(scores > EVEN).tolist():
        best = np.argsort(-probabilities[row], kind="stable")[:2]
        why = " or ".join(f"{material.names[numbers[place]]} ({probabilities[row, place]:.0%})" for place in best)
        shown = material.nearest(row, ROBUST_FEATURE)
        findings.append(material.finding(Kind.UNSURE, scores[row], row, f"{why}?", shown))
    return Found(findings, Rule(f"{who} no label more than {EVEN:.0%}", EVEN, len(scores)), scores)
