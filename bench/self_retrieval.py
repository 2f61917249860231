"""Does a perturbed exemplar still find itself, and its kind? (Figs. 3 and 6, §4.9.)

The query is an exemplar, perturbed; the exemplar itself stays in the set (§4.4).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from tmm_engine.bench.attack import features_of
from tmm_engine.bench.noise import Family, Image, Perturbation
from tmm_engine.bench.records import RecordFile
from tmm_engine.bench.retrievers import Retriever, rank_of, scores_of_all, top
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.store.memory import MemoryStore

KEY = ("query", "perturbation", "method")


def measure_self_retrieval(
    retrievers: Sequence[Retriever],
    queries: Int64[np.ndarray, "q"],
    store: MemoryStore,
    perturbations: Sequence[Perturbation],
    record_file: RecordFile,
    *,
    classifier: Classifier,
    k: int = 10,
    seed: int = 0,
    extra: dict[str, dict[str, Any]] | None = None,
    progress: Progress = silent,
) -> None:
    """Append a record for every query × perturbation × method that has none yet.

    A record holds the ``rank`` of the exemplar that the query is (0 is first), its ``reciprocal_rank`` 1/(1 + rank),
    the ``overlap`` of the top k with the method's own for the clean query, in [0, 1], and ``label_precision``: the
    share, of the k best other exemplars, that bears the query's label. That of the clean query also holds its
    ``neighbours``, the ids of the top k: methods and perturbations that join later need not search for them again.

    Args:
        retrievers: All see the same queries and the same noise.
        queries: Rows of the store.
        store: The exemplars.
        perturbations: What is done to each; the clean query comes first, whether it is among them or not.
        record_file: Opened with KEY.
        classifier: Whose features PGD moves.
        k: Neighbours looked at.
        seed: Of the noise; each query draws its own.
        extra: Fields to add to a method's records.
        progress: Told of searches done.

    Raises:
        InputError: k is not below the number of exemplars.
    """
    if not 1 <= k < len(store):
        raise InputError(f"expected k in [1, {len(store) - 1}], fewer than the {len(store)} exemplars, got {k}")
    clean = Perturbation(Family.CLEAN, 0.0)
    ordered = [clean, *(one for one in perturbations if one != clean)]
    total, done = len(queries) * len(ordered), 0
    for row in queries.tolist():
        image = store.images(np.array([row]))[0].astype(np.float32) / np.float32(255.0)
        noise = int(np.random.SeedSequence((seed, row)).generate_state(1)[0])
        id_ = str(store.ids[row])
        answers = _clean_answers(retrievers, id_, record_file)
        for perturbation in ordered:
            key = {"query": id_, "perturbation": perturbation.name}
            missing = [one for one in retrievers if not record_file.done(**key, method=one.name)]
            if perturbation is clean:  # the others' overlap is with it
                unfinished = (one for one in retrievers if _unfinished(one, ordered, id_, record_file))
                missing = [one for one in unfinished if one.name not in answers]
            for retriever, scores in scores_under(perturbation, image, missing, seed=noise, classifier=classifier):
                name = retriever.name
                best = top(scores, store.ids, k)
                neighbours = store.ids[best].tolist()
                answers.setdefault(name, neighbours)
                if not record_file.done(**key, method=name):
                    about = {"family": str(perturbation.family), "level": perturbation.level, "method": name}
                    found = _measured(scores, store, row=row, neighbours=neighbours, clean=answers[name])
                    kept = {"neighbours": neighbours} if perturbation is clean else {}
                    record_file.append(key | about | found | kept | (extra or {}).get(name, {}))
            done += 1
            progress("searching", done, total)


def scores_under(
    perturbation: Perturbation, image: Image, retrievers: Sequence[Retriever], *, seed: int, classifier: Classifier
) -> Iterator[tuple[Retriever, Float[np.ndarray, "n"]]]:
    """Every retriever's scores for the perturbed image: the same for all, but each its own under an adaptive attack."""
    if perturbation.family is Family.ADAPTIVE:
        for retriever in retrievers:
            yield retriever, retriever.scores(perturbation.apply(image, seed=seed, embedding=retriever.embedding))
    elif retrievers:
        query = perturbation.apply(image, seed=seed, embedding=features_of(classifier))
        yield from scores_of_all(retrievers, query)


def _clean_answers(retrievers: Sequence[Retriever], query: str, record_file: RecordFile) -> dict[str, list[str]]:
    """By method the top k for the clean query, where the file holds it; older files do not."""
    clean = Perturbation(Family.CLEAN, 0.0).name
    records = {one.name: record_file.find(query=query, perturbation=clean, method=one.name) for one in retrievers}
    return {name: record["neighbours"] for name, record in records.items() if record and "neighbours" in record}


def _unfinished(
    retriever: Retriever, perturbations: Sequence[Perturbation], query: str, record_file: RecordFile
) -> bool:
    return any(not record_file.done(query=query, perturbation=one.name, method=retriever.name) for one in perturbations)


def _measured(
    scores: Float[np.ndarray, "n"],
    store: MemoryStore,
    *,
    row: int,
    neighbours: Sequence[str],
    clean: Sequence[str],
) -> dict[str, int | float]:
    rank, k = rank_of(scores, store.ids, row), len(neighbours)
    others = top(scores, store.ids, k, without=row)
    return {
        "rank": rank,
        "reciprocal_rank": 1.0 / (1.0 + rank),
        "overlap": len(set(neighbours) & set(clean)) / k,
        "label_precision": float((store.labels[others] == store.labels[row]).mean()),
    }
