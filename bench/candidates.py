"""What a candidate set gives up: how much of exact TMM's top 10 the candidates of each prefilter contain.

And what the global trigger gives up: the rank at which it, and the query's own trigger, find the true exemplar.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from rich.console import Console
from rich.table import Table

from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.ranking import in_turn
from tmm_engine.index.neighbours.search import Neighbours
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.records import ImageSource
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.rerank.columns import robust_columns
from tmm_engine.rerank.global_trigger import make_global_trigger
from tmm_engine.rerank.settings import preset
from tmm_engine.rerank.tmm import TmmNN

TOP = 10
SIZES = (200, 1_000, 5_000)
"""M, the numbers of candidates."""

Image = Float32[np.ndarray, "c h w"]


def brightness(factor: float) -> Callable[[Image, np.random.Generator], Image]:
    """x · factor."""
    return lambda image, _: image * np.float32(factor)


def gaussian(norm: float) -> Callable[[Image, np.random.Generator], Image]:
    """x plus Gaussian noise of the given L2 norm, cut to [0, 1]."""

    def add(image: Image, generator: np.random.Generator) -> Image:
        noise = generator.standard_normal(image.shape).astype(np.float32)
        return np.clip(image + noise * np.float32(norm / np.linalg.norm(noise)), 0, 1)

    return add


PERTURBATIONS = {
    "clean": brightness(1.0),
    "brightness 0.5": brightness(0.5),
    "gaussian 2.5": gaussian(2.5),
    "gaussian 5": gaussian(5.0),
}


@dataclass(frozen=True, slots=True)
class CandidateRecord:
    """One query under one perturbation.

    Attributes:
        query: The exemplar's id.
        perturbation: What was done to it.
        recall: Share of exact TMM's top 10 among the candidates, by prefilter and M: ``"cosine 1000"``.
        rank_query: Rank of the true exemplar in the exact search with the query's own trigger; 0 is first.
        rank_global: The same with the global trigger.
        rank_cosine: The same by cosine similarity.
    """

    query: str
    perturbation: str
    recall: dict[str, float]
    rank_query: int
    rank_global: int
    rank_cosine: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure_candidates(
    source: ImageSource, classifier: Classifier, *, queries: int, progress: Progress = silent
) -> list[CandidateRecord]:
    """Exact searches for seeded exemplars under every perturbation, and what each prefilter would have kept.

    Args:
        source: The exemplars; read into memory.
        classifier: f.
        queries: How many exemplars are searched for, each under every perturbation.
        progress: Told of the searches done.
    """
    config = preset("paper")
    shared = make_global_trigger(source, classifier, config)
    by_global = shared.as_asked_of(config)
    store = MemoryStore.of(source, classifier, columns=robust_columns(shared, classifier))
    tmm = TmmNN(classifier, store, global_trigger=shared)
    nearest = {metric: Neighbours(store, metric) for metric in Metric}
    generator, n = np.random.default_rng(0), len(store)
    records = []
    for row in generator.choice(n, queries, replace=False):
        for name, perturb in PERTURBATIONS.items():
            image = perturb(store.images(np.array([row]))[0].astype(np.float32) / 255, generator)
            query = torch.from_numpy(image).to(classifier.device)
            with torch.inference_mode():
                features = classifier.features(query[None]).cpu().numpy()
            exact = tmm.rank(query, k=n, config=config).rows
            rankings = {str(metric): found.search(features, k=n)[0][0] for metric, found in nearest.items()}
            rankings["union"] = in_turn((rankings["l2"], rankings["cosine"]))
            rankings["global"] = tmm.rank(query, k=n, config=by_global).rows
            recall = {
                f"{prefilter} {size}": len(np.intersect1d(ranking[:size], exact[:TOP])) / TOP
                for prefilter, ranking in rankings.items()
                for size in SIZES
                if size < n
            }
            ranks = [
                int(np.flatnonzero(ranking == row)[0]) for ranking in (exact, rankings["global"], rankings["cosine"])
            ]
            records.append(CandidateRecord(str(store.ids[row]), name, recall, *ranks))
            progress("searching", len(records), queries * len(PERTURBATIONS))
    return records


def summarise(records: Sequence[CandidateRecord]) -> list[dict[str, Any]]:
    """For each perturbation: mean recall of every prefilter and M, and median ranks of the true exemplar."""
    rows = []
    for name in dict.fromkeys(record.perturbation for record in records):
        chosen = [record for record in records if record.perturbation == name]
        recall = {key: float(np.mean([record.recall[key] for record in chosen])) for key in chosen[0].recall}
        ranks = {
            f"median rank, {kind}": float(np.median([getattr(record, f"rank_{kind}") for record in chosen]))
            for kind in ("query", "global", "cosine")
        }
        rows.append({"perturbation": name, "queries": len(chosen)} | recall | ranks)
    return rows


def print_candidates(records: Sequence[CandidateRecord]) -> None:
    """The summary as a table on stdout: a column for each perturbation."""
    columns = summarise(records)
    table = Table("", *(column["perturbation"] for column in columns), box=None)
    for name in list(columns[0])[2:]:
        recall = not name.startswith("median")
        label = f"recall, {name}" if recall else f"{name} trigger" if "cosine" not in name else name
        table.add_row(label, *(f"{column[name]:.2f}" if recall else f"{column[name]:,.1f}" for column in columns))
    console = Console()
    console.print(table)
    console.print(
        f"{columns[0]['queries']} queries; recall of exact TMM's top {TOP} in the candidates; rank 0 is first",
        highlight=False,
    )
