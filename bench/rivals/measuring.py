"""Every simple rival of mode robust on both jobs: finding the very image, and what is like a query nobody has seen.

All ways are computed from the same passes of the network over the same perturbed images, so that none costs more than
a matrix product and hundreds can be compared: layers, poolings, whitenings, pixels, hashes, views, mixtures,
re-rankings. Readings of TMM-NN (`measure_presets`) meet the same images, one query at a time.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from tmm_engine.bench.loading import HeldOut
from tmm_engine.bench.noise import Family, Perturbation
from tmm_engine.bench.records import RecordFile
from tmm_engine.bench.retrievers import Recogniser, Retriever, scores_of_all
from tmm_engine.bench.rivals.keeping import Vectors, vectors_of
from tmm_engine.bench.rivals.parts import RAW, RECOGNISER, SAMPLE, Part, Passes
from tmm_engine.bench.rivals.reranking import GATES, expanded, gated, k_reciprocal
from tmm_engine.bench.rivals.roster import Rival, roster
from tmm_engine.bench.suite import Suite
from tmm_engine.index.descriptors.calibration import Calibrated
from tmm_engine.index.descriptors.layers import find_layers
from tmm_engine.index.progress import Progress, silent
from tmm_engine.options import RECOGNITION

KEY = ("job", "perturbation", "method")
VERY_IMAGE, UNSEEN = "the very image", "unseen"
CLEAN = Perturbation(Family.CLEAN, 0.0)


def measure_rivals(
    held: HeldOut,
    calibrated: Calibrated,
    record_file: RecordFile,
    *,
    perturbations: Sequence[Perturbation],
    rivals: Sequence[Rival] | None = None,
    k: int = 10,
    recognition: float = RECOGNITION,
    keep: Path | None = None,
    progress: Progress = silent,
) -> None:
    """Append a record for every job × perturbation × rival that has none yet.

    A record holds a list over queries each: of the very image ``rank`` (0 is first) and ``right``, how many of the k
    best others have its label; of unseen queries ``right``, ``kept``, how many of the k best are among those of the
    clean query, and ``taken``, whether the query was taken for a copy (null without a gate).

    Args:
        held: Exemplars and queries; as many exemplars are queries too.
        calibrated: What the engine chose for the exemplars.
        record_file: Opened with KEY.
        perturbations: What is done to each query.
        rivals: Default: `roster`.
        k: Neighbours looked at.
        recognition: The gate's threshold.
        keep: The folder that keeps what is looked at in the exemplars (`bench.rivals.keeping`), if any does.
        progress: Told of images embedded and perturbations done.
    """
    suite = held.suite
    rivals = roster(find_layers(suite.classifier)) if rivals is None else rivals
    looked_at = [part for rival in rivals for _, part in rival.parts]
    looked_at += [
        Part(RECOGNISER, part.views) for rival in rivals if rival.reranking in GATES for _, part in rival.parts
    ]
    passes = Passes(suite.classifier, calibrated, looked_at)
    rivals = [rival for rival in rivals if all(passes.available(part) for _, part in rival.parts)]
    everything = np.arange(len(suite.store))
    passes.fit(_pixels(suite, suite.order[::-1][:SAMPLE].copy()))
    of_exemplars = vectors_of(passes, suite.store.images(everything), folder=keep, progress=progress)
    jobs = _BothJobs(held, record_file, k)
    ordered = _clean_first(perturbations)
    for done, perturbation in enumerate(ordered, start=1):
        similarities = _Similarities(passes(jobs.queries(perturbation)), of_exemplars, threshold=recognition)
        for rival in rivals:
            scores, taken = similarities.of(rival)
            jobs.add(rival.name, perturbation, scores, taken and taken[len(held.queries) :])
        progress("comparing", done, len(ordered))


def measure_presets(
    held: HeldOut,
    presets: Sequence[Retriever],
    record_file: RecordFile,
    *,
    perturbations: Sequence[Perturbation],
    k: int = 10,
    progress: Progress = silent,
) -> None:
    """The same of readings of TMM-NN, on the same changed images.

    Args:
        held: As `measure_rivals`; the exemplars have features.
        presets: Of its exemplars.
        record_file: As `measure_rivals`.
        perturbations: As `measure_rivals`.
        k: As `measure_rivals`.
        progress: Told of queries answered.
    """
    jobs = _BothJobs(held, record_file, k)
    ordered, step = _clean_first(perturbations), 2 * len(held.queries)
    for number, perturbation in enumerate(ordered):
        missing = [preset for preset in presets if not jobs.known(preset.name, perturbation)]
        if not missing:
            continue
        images = jobs.queries(perturbation)
        scores: dict[str, list[Float[np.ndarray, "n"]]] = {preset.name: [] for preset in missing}
        for done, image in enumerate(images, start=1):
            for preset, found in scores_of_all(missing, image):
                scores[preset.name].append(found)
            progress("ranking", number * step + done, len(ordered) * step)
        for preset in missing:
            taken = _taken(preset, images[len(held.queries) :])
            jobs.add(preset.name, perturbation, torch.from_numpy(np.stack(scores[preset.name])), taken, keep=True)


def _taken(preset: Retriever, unseen: Float32[np.ndarray, "q c h w"]) -> list[bool] | None:
    """Which of them are taken for copies; None where the reading does not recognise any."""
    copies = [preset.recognised(image) if isinstance(preset, Recogniser) else None for image in unseen]
    flags = [copy_of.share >= 0.5 for copy_of in copies if copy_of is not None]
    return flags or None


def _clean_first(perturbations: Sequence[Perturbation]) -> list[Perturbation]:
    return [CLEAN, *(one for one in perturbations if one != CLEAN)]


class _BothJobs:
    """Exemplars as queries, then queries nobody has seen, under one perturbation after the other; and their records.

    Args:
        held: Exemplars and queries.
        record_file: Opened with KEY.
        k: Neighbours looked at.
    """

    def __init__(self, held: HeldOut, record_file: RecordFile, k: int) -> None:
        self._held, self._file, self._k = held, record_file, k
        self._rows = held.suite.queries(len(held.queries))
        self._plain = np.concatenate([_pixels(held.suite, self._rows), held.queries])
        kept = [record for record in record_file.records if "neighbours" in record]
        self._clean = {record["method"]: np.array(record["neighbours"], dtype=np.int64) for record in kept}

    def queries(self, perturbation: Perturbation) -> Float32[np.ndarray, "q2 c h w"]:
        """Of both jobs, changed."""
        places = range(len(self._plain))
        seeds = [int(np.random.SeedSequence((self._held.suite.seed, place)).generate_state(1)[0]) for place in places]
        return np.stack([perturbation.apply(image, seed=seed) for image, seed in zip(self._plain, seeds, strict=True)])

    def known(self, method: str, perturbation: Perturbation) -> bool:
        """Whether both records are there, and what later ones are compared with."""
        return method in self._clean and all(self._done(job, method, perturbation) for job in (VERY_IMAGE, UNSEEN))

    def add(
        self,
        method: str,
        perturbation: Perturbation,
        scores: Float[Tensor, "q2 n"],
        taken: list[bool] | None,
        *,
        keep: bool = False,
    ) -> None:
        """The records of both jobs that are not there yet; the clean ones come first.

        Args:
            method: Its name.
            perturbation: What was done to the queries.
            scores: Of all queries.
            taken: Of the unseen ones: whether each was taken for a copy.
            keep: Whether the record of clean unseen queries holds their ``neighbours`` too, the rows of the top k: then
                a later run need not answer them again.
        """
        count, k, labels = len(self._rows), self._k, self._held.suite.store.labels
        about = {"perturbation": perturbation.name, "family": str(perturbation.family), "level": perturbation.level}
        best = _best(scores, k + 1)
        found = best[count:, :k]
        clean = self._clean.setdefault(method, found)
        for job, measured in (
            (VERY_IMAGE, _very_image(scores[:count], best[:count], labels, self._rows)),
            (UNSEEN, _unseen(found, clean, labels, self._held.labels, taken)),
        ):
            if not self._done(job, method, perturbation):
                kept = {"neighbours": found.tolist()} if keep and (job, perturbation) == (UNSEEN, CLEAN) else {}
                self._file.append({"job": job} | about | {"method": method} | measured | kept)

    def _done(self, job: str, method: str, perturbation: Perturbation) -> bool:
        return self._file.done(job=job, perturbation=perturbation.name, method=method)


def _pixels(suite: Suite, rows: Int64[np.ndarray, "rows"]) -> Float32[np.ndarray, "rows c h w"]:
    return suite.store.images(rows).astype(np.float32) / np.float32(255.0)


class _Similarities:
    """Of queries and exemplars by each part; a mixture's are the weighted sum, since parts are of unit length."""

    def __init__(self, queries: Vectors, exemplars: Vectors, *, threshold: float) -> None:
        self._queries, self._exemplars, self._threshold = queries, exemplars, threshold
        self._computed: dict[Part, Float[Tensor, "q n"]] = {}

    def of(self, rival: Rival) -> tuple[Float[Tensor, "q n"], list[bool] | None]:
        """Larger is nearer; and which queries were taken for copies, where that is looked at."""
        (_, first), *_ = rival.parts
        own, theirs = self._queries[first], self._exemplars[first]
        if rival.reranking in GATES:
            by = Part(RECOGNISER, first.views)
            copies = self._queries[by], self._exemplars[by]
            scores, flags = gated(own, theirs, copies, threshold=self._threshold, first=GATES[rival.reranking])
            return scores, flags.tolist()
        if rival.reranking == "k-reciprocal":
            return k_reciprocal(own, theirs), None
        if rival.reranking is not None:
            return expanded(own, theirs, neighbours=int(rival.reranking.split()[1]), power=3.0), None
        return torch.stack([weight * self._by(part) for weight, part in rival.parts]).sum(0), None

    def _by(self, part: Part) -> Float[Tensor, "q n"]:
        if part not in self._computed:
            own, theirs = self._queries[part], self._exemplars[part]
            by_distance = part.source == RAW
            self._computed[part] = -torch.cdist(own.double(), theirs.double()) if by_distance else own @ theirs.T
        return self._computed[part]


def _best(scores: Float[Tensor, "q n"], k: int) -> Int64[np.ndarray, "q k"]:
    """The k best of each row, best first."""
    return scores.topk(k, dim=1).indices.numpy()


def _very_image(
    scores: Float[Tensor, "q n"],
    best: Int64[np.ndarray, "q k1"],
    labels: Int64[np.ndarray, "n"],
    rows: Int64[np.ndarray, "q"],
) -> dict[str, list[int]]:
    """`best` is one more than is looked at, since the image itself does not count."""
    own = torch.from_numpy(rows)[:, None]
    rank = (scores > scores.gather(1, own)).sum(dim=1)
    right = []
    for found, itself in zip(best, rows, strict=True):
        others = found[found != itself][: best.shape[1] - 1]
        right.append(int((labels[others] == labels[itself]).sum()))
    return {"rank": rank.tolist(), "right": right}


def _unseen(
    found: Int64[np.ndarray, "q k"],
    clean: Int64[np.ndarray, "q k"],
    labels: Int64[np.ndarray, "n"],
    own: Int64[np.ndarray, "q"],
    taken: list[bool] | None,
) -> dict[str, list[int] | list[bool] | None]:
    kept = [len(set(now) & set(before)) for now, before in zip(found.tolist(), clean.tolist(), strict=True)]
    right = (labels[found] == own[:, None]).sum(axis=1)
    return {"right": right.tolist(), "kept": kept, "taken": taken}
