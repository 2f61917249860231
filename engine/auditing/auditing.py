"""An audit of an index, kind by kind: what cannot be looked for is said, everything else is done."""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tmm_engine.auditing.duplicates import find_duplicates, find_leaks
from tmm_engine.auditing.findings import Audit, Evidence, Finding, Found, Kind, Known
from tmm_engine.auditing.images import find_foreign, find_unsure, find_wrong_labels
from tmm_engine.auditing.material import FEWEST, SHOWN, Material
from tmm_engine.auditing.options import AuditOptions
from tmm_engine.auditing.others import Others
from tmm_engine.index.descriptors.columns import COPY_FEATURE
from tmm_engine.index.errors import InputError
from tmm_engine.index.neighbours.graph import nearest_exemplars
from tmm_engine.index.progress import Progress, silent
from tmm_engine.snapshot import Snapshot

CHANCE = 1e-3
"""Of an image that is no copy to be taken for one."""


def audit_snapshot(
    snapshot: Snapshot, options: AuditOptions, *, others: Others | None = None, progress: Progress = silent
) -> Audit:
    """Everything that is asked for.

    Args:
        snapshot: What is audited.
        options: What for.
        others: Another source, for leaks.
        progress: Told of what is done.
    """
    material = Material(snapshot, options, progress)
    ways: dict[Kind, Callable[[], Found]] = {
        Kind.DUPLICATES: lambda: find_duplicates(material),
        Kind.LEAKS: lambda: find_leaks(material, others),
        Kind.LABELS: lambda: find_wrong_labels(material),
        Kind.FOREIGN: lambda: find_foreign(material),
        Kind.UNSURE: lambda: find_unsure(material),
    }
    found: dict[Kind, Found] = {}
    seconds: dict[str, float] = {}
    for kind in (kind for kind in Kind if kind in options.kinds):
        began = time.perf_counter()
        found[kind] = ways[kind]()
        seconds[str(kind)] = time.perf_counter() - began
    return Audit(
        findings=tuple(finding for each in found.values() for finding in sorted(each.findings, key=_surest)),
        rules={kind: each.rule for kind, each in found.items() if each.rule is not None},
        notes=tuple(material.notes),
        exemplars=len(snapshot.store),
        seconds=seconds,
        scores={kind: each.scores for kind, each in found.items() if each.scores is not None},
        pairs=material.detector.pairs if Kind.DUPLICATES in found and material.detector is not None else None,
        suspicious={kind: tuple(each.suspicious) for kind, each in found.items() if each.suspicious},
    )


def find_known(snapshot: Snapshot, images: Others, *, memory: int, progress: Progress = silent) -> list[Known]:
    """Whether images are among the exemplars.

    Raises:
        InputError: there are too few to say.
    """
    material = Material(snapshot, AuditOptions(memory=memory), progress)
    detector, column = material.detector, material.column(COPY_FEATURE)
    if detector is None:
        raise InputError(f"expected at least {FEWEST} exemplars to compare images with, got {len(snapshot.store)}")
    found = []
    for batch in images.described(column, progress):
        pairs = detector.across(batch.features, batch.images)
        rows, similarity = nearest_exemplars(snapshot.store, batch.features, k=SHOWN, column=column, memory=memory)
        for place, name in enumerate(batch.ids):
            own = np.flatnonzero(pairs.first == place)
            scores = 1 - detector.tail.chance(pairs.statistic[own])
            by_row = dict(zip(pairs.second[own].tolist(), scores.tolist(), strict=True))
            alike = zip(rows[place].tolist(), similarity[place].tolist(), strict=True)
            evidence = [replace(material.evidence(row, much), score=by_row.get(row, 0.0)) for row, much in alike]
            found.append(_known(name, sorted(evidence, key=lambda each: -(each.score or 0.0))))
    return found


def _known(name: str, evidence: list[Evidence]) -> Known:
    best = evidence[0].score or 0.0
    return Known(name, best >= 1 - CHANCE, best, tuple(evidence))


def _surest(finding: Finding) -> tuple[float, str]:
    return (-finding.score, finding.id)
