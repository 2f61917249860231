"""How long every path takes, side by side in one run on the same data, as ratios.

Each path is measured several times, all paths in turn, so that a slow moment of the machine meets all of them; the
medians make the ratios. On a GPU every timing waits until it has nothing left to do, before and after.
"""

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tmm_engine.backends import require_onnx
from tmm_engine.bench.latency_photographs import time_photographs
from tmm_engine.bench.latency_robust import time_robust
from tmm_engine.bench.machine import describe_machine
from tmm_engine.bench.peak import peak_of_build, peak_of_search
from tmm_engine.index.batches import forward_batch_size
from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.neighbours.metric import Metric
from tmm_engine.index.neighbours.search import Neighbours
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.sources.arrays import ArraySource
from tmm_engine.index.sources.records import ImageSource
from tmm_engine.index.store.building import write_index
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.rerank.backbone import Precision, TorchBackbone, specialised
from tmm_engine.rerank.columns import global_columns
from tmm_engine.rerank.global_trigger import make_global_trigger
from tmm_engine.rerank.onnx_backbone import TRIGGERED, OnnxBackbone, export_onnx
from tmm_engine.rerank.optimisation import make_trigger
from tmm_engine.rerank.rank import Ranking
from tmm_engine.rerank.reference import LiteralModel, reference_fisher, reference_scores, reference_trigger
from tmm_engine.rerank.settings import GLOBAL_PRESET, QueryTrigger, preset
from tmm_engine.rerank.tmm import TmmNN

GROUPS = (
    "card",
    "neighbours",
    "triggers",
    "forward",
    "growth",
    "agreement",
    "reference",
    "build",
    "robust",
    "photographs",
)
"""What is measured together; ``card`` on a GPU only."""

SIZES = (2_000, 5_000, 10_000, 20_000, 60_000)
RATIO_SIZE = 10_000  # exemplars behind the ratios to a forward pass
EAGER_STEPS = 100
TOGETHER = 16
CANDIDATES = 1_000
AGREEMENT_QUERIES = 10
REFERENCE_BATCHES = (256, 1024)
BUILD_SIZES = (30_000, 90_000)  # both beyond what a build holds before it writes
MATRIX, PRODUCTS = 8192, 20  # side of a matrix large enough for a GPU's full rate, products of it in one timing
NOISE = 2.5  # L2 norm of what is added to an exemplar to make a query


@dataclass(frozen=True, slots=True)
class Record:
    """One timing: `path` over `exemplars` exemplars took `seconds`, `trigger_seconds` of it for the trigger."""

    path: str
    exemplars: int
    seconds: float
    trigger_seconds: float = 0.0


@dataclass(slots=True)
class Latency:
    """All timings of a run, and what follows from them."""

    machine: dict[str, Any] = field(default_factory=describe_machine)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    records: list[Record] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    device: str = "cpu"

    def time(self, path: str, exemplars: int, work: Callable[[], Any]) -> Any:
        """Run and record; a ranking's own account tells the trigger's share."""
        self._wait()
        start = time.perf_counter()
        result = work()
        self._wait()
        seconds = time.perf_counter() - start
        rankings = result if isinstance(result, list) else [result]
        trigger = sum((ranking.timings["trigger"] for ranking in rankings if isinstance(ranking, Ranking)), 0.0)
        self.records.append(Record(path, exemplars, seconds, trigger))
        return result

    def forget(self, *paths: str) -> None:
        """Drop all timings of these paths, which were to warm up."""
        self.records = [record for record in self.records if record.path not in paths]

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def seconds(self, path: str, exemplars: int, *, without_trigger: bool = False) -> list[float]:
        """All timings of a path."""
        found = [record for record in self.records if (record.path, record.exemplars) == (path, exemplars)]
        return [record.seconds - (record.trigger_seconds if without_trigger else 0.0) for record in found]

    def median(self, path: str, exemplars: int, *, without_trigger: bool = False) -> float:
        """Median seconds of a path."""
        return statistics.median(self.seconds(path, exemplars, without_trigger=without_trigger))

    def paths(self) -> list[tuple[str, int]]:
        """Every (path, exemplars), in the order of first measurement."""
        return list(dict.fromkeys((record.path, record.exemplars) for record in self.records))

    def save(self, path: Path) -> None:
        """Raw records, figures, machine and versions, as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


class LatencyBench:
    """The data of a run, and one method per group of paths.

    Args:
        source: Exemplars; read into memory.
        classifier: f, on the device to measure.
        repeats: How often each path is measured.
        progress: Told of the groups done.

    Raises:
        InputError: too few exemplars to make the queries of.
    """

    def __init__(
        self, source: ImageSource, classifier: Classifier, *, repeats: int = 5, progress: Progress = silent
    ) -> None:
        self.classifier, self.repeats, self.progress = classifier, repeats, progress
        self.config = preset("paper")
        self.latency = Latency(device=str(classifier.device))
        self.fast = preset(GLOBAL_PRESET)
        self.global_trigger = make_global_trigger(source, classifier, self.fast)
        self.store = MemoryStore.of(source, classifier, columns=global_columns(self.global_trigger, classifier))
        self.sizes = sorted({min(size, len(self.store)) for size in SIZES})
        self.size = min(RATIO_SIZE, len(self.store))
        self.queries = self._noisy_exemplars(max(TOGETHER, AGREEMENT_QUERIES))

    def run(self, only: Sequence[str] = ()) -> Latency:
        """All groups of paths, or some, in an order that lets the cheap fail first. None needs another to have run.

        Args:
            only: Of `GROUPS`; none given is all that this device has.

        Raises:
            InputError: no such group.
        """
        for name in only:
            if name not in GROUPS:
                raise InputError(f"unknown group {name!r}{nearest(name, GROUPS)}; known: {', '.join(GROUPS)}")
        here = [name for name in GROUPS if name != "card" or self.classifier.device.type == "cuda"]
        groups = [name for name in here if name in only or not only]
        for done, name in enumerate(groups):
            self.progress("measuring", done, len(groups))
            getattr(self, name)()
        self.progress("measuring", len(groups), len(groups))
        return self.latency

    def card(self) -> None:
        """The bf16 pass over images on the device, as a share of the rate at which that multiplies large matrices.

        Its operations are counted in the network that runs: of the specialised one, without taps that meet padding.
        """
        device, shape, n = self.classifier.device, self.classifier.image_shape, self.sizes[-1]
        chunks = torch.from_numpy(self.store.images(np.arange(n))).to(device).split(forward_batch_size(shape))
        backbone = TorchBackbone(specialised(self.classifier), Precision.BF16)
        zeros = torch.zeros(shape, device=device)
        passed = partial(backbone, trigger=zeros, image_weight=0.5, trigger_weight=0.5, clamp=True)
        generator = torch.Generator(device).manual_seed(0)
        factor = torch.randn(MATRIX, MATRIX, generator=generator, device=device).bfloat16()
        multiply = partial(torch.matmul, factor, factor, out=torch.empty_like(factor))
        for repeat in range(self.repeats + 1):
            self.latency.time("pass bf16", n, lambda: [passed(images=chunk) for chunk in chunks])
            self.latency.time("products bf16", MATRIX, lambda: [multiply() for _ in range(PRODUCTS)])
            if repeat == 0:
                self.latency.forget("pass bf16", "products bf16")
        with FlopCounterMode(display=False) as counter:
            passed(images=chunks[0][:1])
        rate = 2 * MATRIX**3 * PRODUCTS / self.latency.median("products bf16", MATRIX)  # operations a second
        images_per_second = n / self.latency.median("pass bf16", n)
        self.latency.figures |= {
            "images_per_second": images_per_second,
            "bf16_tflops": rate / 1e12,
            "pass_of_bf16_rate": images_per_second * counter.get_total_flops() / rate,
        }

    def forward(self) -> None:
        """Exact search beside bare forward passes over the same images."""
        n, time_ = self.size, self.latency.time
        tmm, rough = self._tmm(n), self._tmm(n, precision=Precision.BF16)
        onnx = self._onnx(n)
        plain = self.classifier.backbone
        half = _bf16(self.classifier)
        images = torch.from_numpy(self.store.images(np.arange(n)))
        for repeat in range(self.repeats + 1):  # the first is to warm up
            time_("forward fp32", n, lambda: _forward(plain, images, self.classifier))
            time_("forward bf16", n, lambda: _forward(half, images, self.classifier))
            time_("exact", n, lambda: tmm.rank(self.queries[0], k=10, config=self.config))
            time_("exact bf16", n, lambda: rough.rank(self.queries[0], k=10, config=self.config))
            if onnx is not None:
                time_("exact onnx", n, lambda: onnx.rank(self.queries[0], k=10, config=self.config))
            if repeat == 0:
                self.latency.forget("forward fp32", "forward bf16", "exact", "exact bf16", "exact onnx")
        latency = self.latency
        forward = latency.median("forward fp32", n)
        whole, exact = latency.median("exact", n), latency.median("exact", n, without_trigger=True)
        trigger = whole - exact
        latency.figures |= {
            "exact_over_forward": exact / forward,
            "exact_over_forward_and_trigger": whole / (forward + trigger),
            "bf16_over_fp32_forward": latency.median("exact bf16", n, without_trigger=True) / forward,
            "bf16_over_bf16_forward": latency.median("exact bf16", n, without_trigger=True)
            / latency.median("forward bf16", n),
            "forward_images_per_second": n / forward,
        }
        if onnx is not None:
            latency.figures["onnx_over_forward"] = latency.median("exact onnx", n, without_trigger=True) / forward

    def agreement(self) -> None:
        """Share of the fp32 top 10 that the bf16 pass with re-scoring finds."""
        exact, rough = self._tmm(self.size), self._tmm(self.size, precision=Precision.BF16)
        shares = []
        for query in self.queries[:AGREEMENT_QUERIES]:
            both = [tmm.rank(query, k=10, config=self.config).rows for tmm in (exact, rough)]
            shares.append(len(np.intersect1d(both[0], both[1])) / 10)
        self.latency.figures["bf16_agreement"] = float(np.mean(shares))

    def reference(self) -> None:
        """The literal version at two batch sizes of its scoring; the better counts, without its Fisher information.

        That is computed one gradient at a time there, which would flatter the comparison.
        """
        images, labels = torch.from_numpy(self.store.images(np.arange(self.size))), self.store.labels[: self.size]
        device, n = self.classifier.device, self.size
        trigger = make_trigger(self.classifier, self.queries[:1], QueryTrigger()).trigger[0]
        model = LiteralModel(self.classifier.backbone, self.classifier.head)
        exemplars = images.to(device) / 255.0
        self.latency.time("reference, Fisher alone", n, lambda: reference_fisher(model, exemplars))
        for batch in REFERENCE_BATCHES:
            search = partial(
                reference_scores, self.classifier, self.queries[0], images, torch.from_numpy(labels), self.config
            )
            self.latency.time(f"reference, batch {batch}", n, partial(search, trigger=trigger, batch_size=batch))
        tmm = self._tmm(n)
        for repeat in range(self.repeats + 1):
            self.latency.time("exact beside reference", n, lambda: tmm.rank(self.queries[0], k=10, config=self.config))
            if repeat == 0:
                self.latency.forget("exact beside reference")
        best = min(self.latency.median(f"reference, batch {batch}", n) for batch in REFERENCE_BATCHES)
        without_fisher = best - self.latency.median("reference, Fisher alone", n)
        exact = self.latency.median("exact beside reference", n, without_trigger=True)
        self.latency.figures["reference_over_exact"] = without_fisher / exact

    def triggers(self) -> None:
        """100 iterations of Eq. 8: a plain loop, ours, and several queries together."""
        full = QueryTrigger(steps=EAGER_STEPS, tolerance=0.0)
        tmm = self._tmm(self.sizes[0])
        model = torch.nn.Sequential(self.classifier.backbone, self.classifier.head)
        several, time_ = self.queries[:TOGETHER], self.latency.time
        losses: dict[str, float] = {}
        for repeat in range(self.repeats + 1):
            eager = time_("trigger, plain loop", 1, lambda: reference_trigger(model, several[0], full))
            ours = time_("trigger", 1, lambda: make_trigger(tmm.classifier, several[:1], full))
            time_("16 triggers together", TOGETHER, lambda: make_trigger(tmm.classifier, several, full))
            time_("16 triggers apart", TOGETHER, lambda: [make_trigger(tmm.classifier, x[None], full) for x in several])
            losses = {"plain": _trigger_loss(model, several[0], eager), "ours": float(ours.loss[0])}
            if repeat == 0:
                self.latency.forget("trigger, plain loop", "trigger", "16 triggers together", "16 triggers apart")
        self.latency.figures |= {
            "trigger_over_eager": self.latency.median("trigger", 1) / self.latency.median("trigger, plain loop", 1),
            "trigger_loss_eager": losses["plain"],
            "trigger_loss": losses["ours"],
            "batched_trigger": self.latency.median("16 triggers together", TOGETHER)
            / self.latency.median("16 triggers apart", TOGETHER),
        }

    def growth(self) -> None:
        """Exact search from the smallest size to the largest; candidates and the global trigger at the largest."""
        largest = self.sizes[-1]
        searchers = {size: self._tmm(size) for size in self.sizes}
        near = Neighbours(_first(self.store, largest), Metric.COSINE)
        for repeat in range(self.repeats + 1):
            self._grow(searchers, near, self.queries[repeat % len(self.queries)])
            if repeat == 0:
                self.latency.forget("exact by size", "candidates", "global", "fast")
        exact = {size: self.latency.median("exact by size", size) for size in self.sizes}
        self.latency.figures |= {
            "candidates_over_exact": self.latency.median("candidates", largest) / exact[largest],
            "global_over_exact": self.latency.median("global", largest) / exact[largest],
            "fast_over_exact": self.latency.median("fast", largest) / exact[largest],
        }
        if len(exact) > 1:
            slope, _ = np.polyfit(np.log(list(exact)), np.log(list(exact.values())), 1)
            self.latency.figures["slope"] = float(slope)

    def _grow(self, searchers: dict[int, TmmNN], near: Neighbours, query: Float[Tensor, "c h w"]) -> None:
        def by_candidates() -> Ranking:
            features = self.classifier.features(query[None]).cpu().numpy()
            [(rows, _)] = near.search(features, k=CANDIDATES)
            return tmm.rank(query, k=10, config=self.config, candidates=rows)

        for size, tmm in searchers.items():  # leaves the largest in `tmm`
            self.latency.time("exact by size", size, partial(tmm.rank, query, k=10, config=self.config))
        by_global = self.global_trigger.as_asked_of(self.config)
        self.latency.time("candidates", size, by_candidates)
        self.latency.time("global", size, partial(tmm.rank, query, k=10, config=by_global))
        self.latency.time("fast", size, partial(tmm.rank, query, k=10, config=self.fast))

    def neighbours(self) -> None:
        """L2 and cosine beside FAISS called directly."""
        n = len(self.store)
        features = self.store.features(np.arange(n))
        query = self.classifier.features(self.queries[:1]).cpu().numpy()
        for metric in Metric:
            ours = Neighbours(self.store, metric)
            unit = features / np.linalg.norm(features, axis=1, keepdims=True)
            bare = faiss.IndexFlatL2(features.shape[1]) if metric is Metric.L2 else faiss.IndexFlatIP(features.shape[1])
            bare.add(features if metric is Metric.L2 else unit)
            for _ in range(20 * self.repeats):
                self.latency.time(f"{metric} by FAISS alone", n, partial(bare.search, query, 10))
                self.latency.time(f"{metric}", n, partial(ours.search, query, k=10))
            self.latency.figures[f"{metric}_over_faiss"] = self.latency.median(str(metric), n) / self.latency.median(
                f"{metric} by FAISS alone", n
            )

    def build(self) -> None:
        """Building an index beside a bare forward pass; peak memory of searching, and of building at two sizes."""
        n, time_ = self.size, self.latency.time
        with tempfile.TemporaryDirectory() as folder:
            source = ArraySource(self.store.images(np.arange(n)), self.store.labels[:n])
            images = torch.from_numpy(self.store.images(np.arange(n)))
            for _ in range(self.repeats):
                time_("build", n, lambda: write_index(source, Path(folder) / "a.idx", self.classifier, overwrite=True))
                time_("forward beside build", n, lambda: _forward(self.classifier.backbone, images, self.classifier))
            largest = ArraySource(self.store.images(np.arange(len(self.store))), self.store.labels)
            write_index(largest, Path(folder) / "b.idx", self.classifier)
            self.latency.figures["peak_mib"] = peak_of_search(Path(folder) / "b.idx")
        small, large = (peak_of_build(size) for size in BUILD_SIZES)
        self.latency.figures |= {
            "build_over_forward": self.latency.median("forward beside build", n) / self.latency.median("build", n),
            "build_peak_mib_small": small,
            "build_peak_mib_large": large,
        }

    def robust(self) -> None:
        """The default of the engine: building in passes of the network, searching beside FAISS, of all exemplars."""
        rows = np.arange(len(self.store))
        source = ArraySource(self.store.images(rows), self.store.labels)
        time_robust(self.latency, source, self.classifier, self.queries.cpu().numpy(), self.store.features(rows))

    def photographs(self) -> None:
        """Building from JPEG files of 640×480; nothing of the source."""
        time_photographs(self.latency, self.repeats)

    def _tmm(self, exemplars: int, *, precision: Precision = Precision.FP32) -> TmmNN:
        return TmmNN(
            self.classifier,
            _first(self.store, exemplars),
            precision=precision,
            global_trigger=self.global_trigger,
        )

    def _onnx(self, exemplars: int) -> TmmNN | None:
        """Exact search with ONNX Runtime, where it is installed."""
        try:
            require_onnx()
        except InputError:
            return None
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(self.classifier, Path(folder) / "onnx")
            backbone = OnnxBackbone.load(
                Path(folder) / "onnx" / TRIGGERED, self.classifier, device=self.classifier.device
            )
        return TmmNN(self.classifier, _first(self.store, exemplars), backbone=backbone)

    def _noisy_exemplars(self, count: int) -> Float[Tensor, "q c h w"]:
        if len(self.store) < count:
            raise InputError(f"expected at least {count} exemplars to time queries with, got {len(self.store)}")
        generator = np.random.default_rng(0)
        images = self.store.images(generator.choice(self.sizes[0], count, replace=False)).astype(np.float32) / 255
        noise = generator.standard_normal(images.shape).astype(np.float32)
        noise *= NOISE / np.linalg.norm(noise.reshape(count, -1), axis=1).reshape(-1, 1, 1, 1)
        return torch.from_numpy(np.clip(images + noise, 0, 1)).to(self.classifier.device)


def _first(store: MemoryStore, count: int) -> MemoryStore:
    rows = np.arange(count)
    return MemoryStore(
        store.images(rows),
        {name: store.features(rows, column=name) for name in store.feature_columns},
        store.labels[:count],
        ids=store.ids[:count].tolist(),
    )


def _forward(backbone: torch.nn.Module, images: Tensor, classifier: Classifier) -> None:
    """A bare forward pass over images as stored, at the engine's own batch size."""
    dtype = next(backbone.parameters()).dtype
    with torch.inference_mode():
        for batch in images.split(forward_batch_size(classifier.image_shape)):
            features = backbone((batch.to(classifier.device).float() / 255.0).to(dtype))
        features.cpu()  # waits for the device


def _bf16(classifier: Classifier) -> torch.nn.Module:
    return copy.deepcopy(classifier.backbone).to(torch.bfloat16).to(memory_format=torch.channels_last)


def _trigger_loss(model: torch.nn.Module, query: Float[Tensor, "c h w"], trigger: Float32[Tensor, "c h w"]) -> float:
    with torch.no_grad():
        difference = model((query + trigger)[None]) - model(query[None])
    return float(difference.square().mean() + 1.0 / trigger.square().sum())
