"""`engine demo`: handwritten digits, a small ResNet, an index, and the modes side by side on clean and darkened
queries.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int64, UInt8
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from tmm_engine.building import build_index
from tmm_engine.digits import load_digits
from tmm_engine.engine import Engine
from tmm_engine.index.columns import embed
from tmm_engine.index.models.architectures import ModelSpec, build_model
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.store.embedding import predict
from tmm_engine.options import Mode
from tmm_engine.query import Query
from tmm_engine.rerank.settings import GLOBAL_PRESET
from tmm_engine.results import SearchResult
from tmm_engine.views.page import write_html
from tmm_engine.views.picture import write_png

EPOCHS = 6
SEED = 0
BATCH = 64
EXEMPLARS = 1400  # of 1,797; the rest test the model
NOISE_STD = 0.3  # in pixels of [0, 1]
PERTURBATIONS = ("clean", "brightness 0.5", "noise 0.3")
SHOWN_QUERIES, SHOWN_HITS = 3, 10  # in the page and the picture


@dataclass(frozen=True, slots=True)
class DemoOutcome:
    """What the demo made and measured.

    Attributes:
        accuracy: Of the classifier on digits it was not trained on, in [0, 1].
        ranks: For each perturbation and mode, the rank of the true exemplar for every query (0 is first).
        labels: For each perturbation and mode, the share of the top 10 that has the query's label.
        exemplars: How many the index holds.
        index: The index.
        html: The page of queries and neighbours.
        png: The same as a picture.
    """

    accuracy: float
    ranks: dict[tuple[str, str], list[int]]
    labels: dict[tuple[str, str], list[float]]
    exemplars: int
    index: Path
    html: Path
    png: Path

    def print(self) -> None:
        """The comparison as a table, and where to look."""
        console = Console()
        queries = len(next(iter(self.ranks.values())))
        table = Table(
            title=f"Does a query find itself? {queries} of the {self.exemplars:,} exemplars as queries",
            title_justify="left",
        )
        table.add_column("query")
        table.add_column("mode")
        for heading in ("first", "median rank", "label@10"):
            table.add_column(heading, justify="right")
        for perturbation in PERTURBATIONS:
            for mode in Mode:
                ranks, labels = self.ranks[perturbation, mode], self.labels[perturbation, mode]
                first = sum(rank == 0 for rank in ranks)
                cells = (f"{first}/{queries}", f"{np.median(ranks) + 1:g}", f"{np.mean(labels):.2f}")
                table.add_row(
                    perturbation if mode is Mode.ROBUST else "", str(mode), *cells, end_section=mode is Mode.COSINE
                )
        console.print(f"classifier: {self.accuracy:.1%} of unseen digits right")
        console.print(table)
        console.print(
            f"first: ranked at the top; median rank: 1 is best; label@10: share of the top 10 with the query's label.\n"
            f"A handful of queries on a toy data set: an illustration, not a measurement. tmm is the preset "
            f"{GLOBAL_PRESET!r}; like robust it stretches a query's contrast first and recognises copies."
        )
        for name, path in (
            ("page", self.html),
            ("picture", self.png),
            ("index", self.index),
            ("queries", self.index.parent / "queries"),
        ):
            console.print(f"{name}: {path}", soft_wrap=True, highlight=False)


def run_demo(out: Path, *, queries: int, progress: Progress) -> DemoOutcome:
    """Train, index, search, compare; everything it makes is in `out`.

    Args:
        out: A folder; made if there is none. What an earlier demo left there is replaced.
        queries: How many exemplars are searched for, each under every perturbation.
        progress: Told of training, building and searching.
    """
    out.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits()
    classifier = _train(images[:EXEMPLARS], labels[:EXEMPLARS], out / "digits-resnet18.safetensors", progress)
    accuracy = _accuracy(classifier, images[EXEMPLARS:], labels[EXEMPLARS:])
    index = out / "digits.idx"
    source = ArraySource(images[:EXEMPLARS], labels[:EXEMPLARS], class_names=[str(digit) for digit in range(10)])
    build_index(source, index, classifier, global_trigger=GLOBAL_PRESET, overwrite=True, progress=progress)
    with Engine.open(index, device="cpu") as engine:
        chosen = np.random.default_rng(SEED).choice(EXEMPLARS, queries, replace=False)
        results = _search(engine, [str(engine.store.ids[row]) for row in chosen], progress)
        exemplars = len(engine)
    shown = [result for result in results if result[0] < SHOWN_QUERIES]
    html, png = out / "report.html", out / "report.png"
    _save_queries(out / "queries", shown)
    write_html(
        [result for _, _, result, _ in shown], html, title="engine demo: handwritten digits", index_name=str(index)
    )
    write_png([result for number, _, result, _ in shown if number == 0], png)
    ranks: dict[tuple[str, str], list[int]] = {}
    agreement: dict[tuple[str, str], list[float]] = {}
    for _, perturbation, result, rank in results:
        key = (perturbation, result.mode)
        ranks.setdefault(key, []).append(rank)
        agreement.setdefault(key, []).append(float(np.mean([hit.label == result.true_label for hit in result.hits])))
    return DemoOutcome(accuracy, ranks, agreement, exemplars, index, html, png)


def _train(
    images: UInt8[np.ndarray, "n 8 8"], labels: Int64[np.ndarray, "n"], weights: Path, progress: Progress
) -> Classifier:
    """A ResNet-18 with a small stem, trained from a seeded start, saved as a user would and loaded again."""
    spec = ModelSpec(
        "resnet18", num_classes=10, in_channels=1, small_stem=True, image_size=(8, 8), mean=(0.0,), std=(1.0,)
    )
    model = build_model(spec).train()
    pixels, targets = torch.from_numpy(images)[:, None].float() / 255.0, torch.from_numpy(labels)
    steps = EPOCHS * -(-len(images) // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=steps)
    generator, done = torch.Generator().manual_seed(0), 0
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(pixels[batch]), targets[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            done += 1
            progress("training", done, steps)
    save_file(model.state_dict(), weights)
    return Classifier.from_architecture("resnet18", image_shape=(1, 8, 8), weights=weights)


def _accuracy(classifier: Classifier, images: UInt8[np.ndarray, "n 8 8"], labels: Int64[np.ndarray, "n"]) -> float:
    return float(np.mean(predict(embed(images[:, None], classifier), classifier) == labels))


def _search(engine: Engine, ids: list[str], progress: Progress) -> list[tuple[int, str, SearchResult, int]]:
    """(number of the query, perturbation, top 10, rank of the true exemplar) for every query, perturbation and mode."""
    answers = []
    total = len(ids) * len(PERTURBATIONS) * len(Mode)
    for number, id_ in enumerate(ids):
        original = engine.exemplar(id_)
        for perturbation in PERTURBATIONS:
            pixels = _perturbed(original.pixels, perturbation, seed=number)
            query = Query(f"{id_}, {perturbation}", pixels, original.label)
            for mode in Mode:
                config = GLOBAL_PRESET if mode is Mode.TMM else None
                everything = engine.search(query, k=len(engine), mode=mode, config=config)
                rank = next(hit.rank for hit in everything.hits if hit.id == id_)
                answers.append((number, perturbation, replace(everything, hits=everything.hits[:SHOWN_HITS]), rank))
                progress("searching", len(answers), total)
    return answers


def _perturbed(pixels: Float32[np.ndarray, "c h w"], perturbation: str, *, seed: int) -> Float32[np.ndarray, "c h w"]:
    if perturbation.startswith("brightness"):
        return pixels * np.float32(0.5)
    if perturbation.startswith("noise"):
        noise = np.random.default_rng(seed).normal(0.0, NOISE_STD, pixels.shape).astype(np.float32)
        return np.clip(pixels + noise, 0, 1)
    return pixels


def _save_queries(folder: Path, shown: list[tuple[int, str, SearchResult, int]]) -> None:
    """The shown queries as image files, to search with from the command line."""
    folder.mkdir(exist_ok=True)
    for _, _, result, _ in shown:
        name = result.query.replace(", ", "-").replace(" ", "-")
        Image.fromarray(result.query_image[0]).save(folder / f"{name}.png")
