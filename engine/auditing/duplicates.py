"""Near-duplicates as groups, and leaks: copies that are in two sources."""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float64

from tmm_engine.auditing.copies import CopyDetector, Pairs, groups
from tmm_engine.auditing.discovery import adjusted
from tmm_engine.auditing.findings import SUSPICIOUS, Evidence, Finding, Found, Kind, Rule
from tmm_engine.auditing.material import Material
from tmm_engine.auditing.others import Described, Others
from tmm_engine.index.descriptors.columns import COPY_FEATURE
from tmm_engine.index.errors import InputError, nearest

Link = tuple[float, float]
"""Of two copies the score and the similarity."""


def find_duplicates(material: Material) -> Found:
    """A finding is a group; its score is that of the member that is least surely one."""
    detector = material.detector
    if detector is None:
        return Found()
    pairs, scores = detector.pairs, _scores(detector, material)
    links: dict[int, Link] = {}
    flagged = np.flatnonzero(scores >= 1 - material.options.rate)
    first, second = pairs.first[flagged], pairs.second[flagged]
    for one, other, score, alike in zip(
        first.tolist(), second.tolist(), scores[flagged].tolist(), pairs.similarity[flagged].tolist(), strict=True
    ):
        for row in (one, other):
            links[row] = max(links.get(row, (0.0, 0.0)), (score, alike))
    findings = [_group(material, rows, links) for rows in groups(first, second)]
    return Found(findings, _rule(material), scores, [] if findings else _most_alike(material, pairs, scores))


def _most_alike(material: Material, pairs: Pairs, scores: Float64[np.ndarray, "p"]) -> list[Finding]:
    """Where nothing is found the likeliest pairs, which are no findings."""
    found = []
    for at in np.argsort(-pairs.statistic, kind="stable")[:SUSPICIOUS].tolist():
        rows, link = [int(pairs.first[at]), int(pairs.second[at])], (float(scores[at]), float(pairs.similarity[at]))
        pair = _group(material, rows, dict.fromkeys(rows, link))
        found.append(replace(pair, why="more alike than others, but of so many some that are no copies would be"))
    return found


def find_leaks(material: Material, others: Others | None) -> Found:
    """Between the index and another, and between the values of a column of metadata."""
    column = material.options.sources
    if others is None and column is None:
        if len(material.options.kinds) == 1:
            raise InputError(
                "leaks: expected two sources to compare, got one: name another index with `against=…`, or a column of "
                "metadata with `sources=…`"
            )
        return Found()
    detector = material.detector
    if detector is None:
        return Found()
    leaks = [] if others is None else _from_others(material, detector, others)
    leaks += [] if column is None else _between(material, detector, column)
    findings = [leak for leak in leaks if leak.score >= 1 - material.options.rate]
    suspicious = [replace(leak, why=f"perhaps {leak.why}; by chance some would be as alike") for leak in leaks]
    return Found(findings, _rule(material), suspicious=[] if findings else suspicious)


def _rule(material: Material) -> Rule:
    return material.rule(f"no more than {material.options.rate:.0%} of the pairs are expected to be none")


def _chosen(
    scores: Float64[np.ndarray, "p"], statistic: Float64[np.ndarray, "p"], may: Bool[np.ndarray, "p"], rate: float
) -> list[int]:
    """Of pairs that may be leaks those that are found; where none is the likeliest."""
    found = np.flatnonzero(may & (scores >= 1 - rate))
    if len(found):
        return found.tolist()
    places = np.flatnonzero(may)
    return places[np.argsort(-statistic[places], kind="stable")[:SUSPICIOUS]].tolist()


def _scores(detector: CopyDetector, material: Material) -> Float64[np.ndarray, "p"]:
    tests = max(len(detector.pairs), len(material.store))
    return 1 - adjusted(detector.tail.chance(detector.pairs.statistic), tests=tests)


def _group(material: Material, rows: list[int], links: dict[int, Link]) -> Finding:
    kept, *copies = sorted(rows, key=lambda row: str(material.store.ids[row]))
    evidence = tuple(replace(material.evidence(row, links[row][1]), score=links[row][0]) for row in copies)
    labels = sorted({material.name(row) for row in rows})
    differ = f"; their labels differ: {', '.join(labels)}" if len(labels) > 1 else ""
    why = f"{len(rows)} pictures are the same, or nearly so{differ}"
    return material.finding(Kind.DUPLICATES, min(links[row][0] for row in copies), kept, why, evidence)


def _from_others(material: Material, detector: CopyDetector, others: Others) -> list[Finding]:
    described = others.described(material.column(COPY_FEATURE), material.progress)
    rate = material.options.rate
    batches = [_compared(batch, detector, rate) for batch in described]
    statistic = np.concatenate([np.empty(0), *(pairs.statistic for _, pairs in batches)])
    chance = detector.tail.chance(statistic)
    scores = 1 - adjusted(chance, tests=max(len(statistic), len(others)))
    ends = np.cumsum([0, *(len(pairs) for _, pairs in batches)])
    found: dict[int, list[Evidence]] = {}
    for place in _chosen(scores, statistic, chance <= rate, rate):
        own = int(np.searchsorted(ends, place, side="right")) - 1
        (batch, pairs), at = batches[own], place - ends[own]
        evidence = batch.evidence(int(pairs.first[at]), float(pairs.similarity[at]))
        leaked = replace(evidence, score=float(scores[place]), source=others.name)
        found.setdefault(int(pairs.second[at]), []).append(leaked)
    return [_leak(material, row, f"also in {others.name}", evidence) for row, evidence in found.items()]


def _compared(batch: Described, detector: CopyDetector, rate: float) -> tuple[Described, Pairs]:
    """Pixels are kept only of what may be a copy."""
    pairs = detector.across(batch.features, batch.images)
    likely = pairs.first[detector.tail.chance(pairs.statistic) <= rate]
    return batch.reduced(set(likely.tolist())), pairs


def _between(material: Material, detector: CopyDetector, column: str) -> list[Finding]:
    metadata = material.store.metadata(np.arange(len(material.store)))
    known = sorted({name for row in metadata for name in row})
    if column not in known:
        raise InputError(
            f"expected a column of metadata among {', '.join(known) or 'none'}, got {column!r}{nearest(column, known)} "
            f"(`sources=…`)"
        )
    values = ["nothing" if row.get(column) is None else str(row[column]) for row in metadata]
    pairs, scores = detector.pairs, _scores(detector, material)
    differ = np.array(
        [values[one] != values[other] for one, other in zip(pairs.first, pairs.second, strict=True)], bool
    )
    found: dict[int, list[Evidence]] = {}
    for at in _chosen(scores, pairs.statistic, differ, material.options.rate):
        one, other = int(pairs.first[at]), int(pairs.second[at])
        evidence = material.evidence(other, float(pairs.similarity[at]))
        found.setdefault(one, []).append(replace(evidence, score=float(scores[at]), source=values[other]))
    return [
        replace(_leak(material, row, f"in more than one {column}", evidence), source=values[row])
        for row, evidence in found.items()
    ]


def _leak(material: Material, row: int, why: str, evidence: list[Evidence]) -> Finding:
    ordered = tuple(sorted(evidence, key=lambda each: -(each.score or 0.0)))
    return material.finding(Kind.LEAKS, ordered[0].score or 0.0, row, why, ordered)
