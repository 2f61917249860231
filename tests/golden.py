"""Golden answers: many searches on tiny images, and what they answered when `golden.json` was recorded.

    python -m tests.golden

records anew. That is only right when answers are meant to change: say so in CHANGELOG.md. `test_golden` compares.
"""

import hashlib
import json
import math
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torchvision.models import VisionTransformer

from tests.conftest import CLASSES, SHAPE, classifier_of, network
from tmm_engine import Engine, build_index
from tmm_engine.index import ArraySource, Classifier
from tmm_engine.rerank import GlobalRecipe, preset

RECORDED = Path(__file__).with_name("golden.json")
FORMAT_2 = Path(__file__).parent / "data" / "format-2.idx"
K = 5
TWINS = (4, 9, 17)  # rows of the same image: ties, in order of id
NAMES = ("ant", "bee", "cat", "dog")

# ---- what is searched for: options of `Engine.search`; "config" is a preset and settings, as the command line has them

QUICK = "paper trigger_steps=20 tuning_min_steps=30"

NEAREST = [
    {"mode": mode} | stretch | recognition
    for mode in ("l2", "cosine")
    for stretch in ({}, {"stretch": True})
    for recognition in ({}, {"recognition": 0.8})
] + [{"mode": "l2", "stretch": False, "recognition": False}]

ROBUST = [
    {},
    {"recognition": False},
    {"recognition": 0.95},
    {"where": "label = 1"},
    {"where": "page > 20 AND label < 3", "candidates": 10},
    *({"candidates": 12, "prefilter": prefilter} for prefilter in ("union", "l2", "cosine", "global")),
    {"candidates": 12, "recognition": False, "k": 20},
    {"config": "robust fusion=2"},
    {"config": "robust fusion=0"},
    {"config": "robust shrinkage=0.1"},
    {"config": "robust tuning=adam tuning_min_steps=40"},
    {"config": "paper trigger=global stretch=true tuning_min_steps=40"},
]

OWN_TRIGGER = [
    {"config": QUICK, "label": 2},
    {"config": QUICK, "together": True},
    {"config": QUICK, "stretch": True},
    {"config": QUICK, "recognition": 0.8},
    {"config": QUICK, "recognition": 0.8, "candidates": 12},
    {"config": QUICK, "where": "label = 1"},
    {"config": QUICK, "where": "page > 20 AND label < 3", "candidates": 10},
    *({"config": QUICK, "candidates": 12, "prefilter": prefilter} for prefilter in ("union", "l2", "cosine", "global")),
    {"config": f"{QUICK} candidate_companions=5", "candidates": 12},
    {"config": f"{QUICK} candidate_companions=0", "candidates": 12},
    *(
        {"config": f"{QUICK} {setting}"}
        for setting in (
            "blend=added",
            "blend=swapped",
            "blend=scaled",
            "clamp=false",
            "score=logit",
            "trigger=patch",
            "fusion=2",
            "fusion=2 recognition=0.8",
            "intensity=0.4",
            "trigger_lr=0.05",
            "tuning_lr=0.01",
            "tuning_batch=16 tuning_epochs=20",
            "ewc_lambda=0",
            "seed=3",
            "max_tuning_exemplars=20",
            "max_tuning_exemplars=20 recognition=0.8",
        )
    ),
    {"config": "paper trigger=fixed-patch tuning_min_steps=40"},
    {"config": "paper trigger=fixed-patch tuning=discriminant"},
    {"config": "paper trigger_steps=30 tuning=discriminant"},
    {"config": "paper trigger_steps=30 tuning=discriminant shrinkage=0.5 fusion=2"},
    {"config": "robust trigger=query trigger_steps=30"},
    {"config": "robust trigger=query trigger_steps=30 candidate_companions=5", "candidates": 12},
    {"config": "robust trigger=query trigger_steps=30 max_tuning_exemplars=20"},
]

A_FEW = [
    {"mode": "l2"},
    {"mode": "cosine", "stretch": True, "recognition": 0.8},
    {},
    {"candidates": 10, "prefilter": "global"},
    {"config": QUICK},
    {"config": f"{QUICK} blend=added", "candidates": 10},
]


def configured(name: str, *settings: str) -> Any:
    """A preset with settings; the record calls `fast` by the name that it had, `robust`."""
    return preset("fast" if name == "robust" else name).with_settings([*settings])


def recipe(*settings: str) -> GlobalRecipe:
    """What the global trigger of the preset `fast` is made with, with settings."""
    return GlobalRecipe.of(preset("fast")).with_settings(settings)


class Search(NamedTuple):
    """One search of a group: its name there, what it was asked for, and the answers as plain values."""

    name: str
    options: dict[str, Any]
    answers: list[dict[str, Any]]


def search(engine: Engine, queries: list[Any], options: dict[str, Any], *, prefix: str = "") -> Search:
    """Ask, and note what was asked for and what was answered."""
    given = {"k": K, "mode": "tmm"} | options  # as was the default when they were recorded
    if given["mode"] == "tmm":
        given["config"] = configured(*options.get("config", "robust").split())
    else:
        given["alone"] = True  # bit for bit
    name = " ".join([*([prefix] if prefix else []), *(f"{key}={value}" for key, value in options.items())])
    return Search(name or "default", options, [plain(result) for result in engine.search_each(queries, **given)])


def plain(result: Any) -> dict[str, Any]:
    """What is kept of an answer: floats in hexadecimal, a trigger by its digest, no times."""
    if not hasattr(result, "hits"):
        return {"query": result.query, "failed": True}
    confidences = [hit.confidence for hit in result.hits]
    pages = [hit.metadata.get("page") for hit in result.hits]
    return {
        "query": result.query,
        "ids": [hit.id for hit in result.hits],
        "scores": [exactly(hit.score) for hit in result.hits],
        "confidences": None if None in confidences else [exactly(confidence) for confidence in confidences],
        "labels": [hit.label for hit in result.hits],
        "pages": None if set(pages) == {None} else pages,
        "predicted": result.predicted_label,
        "recognised_as": result.recognised_as,
        "recognised_share": None if result.recognised_share is None else exactly(result.recognised_share),
        "scored": result.scored,
        "exemplars": result.exemplars,
        "notes": list(result.notes),
        "trigger": None if result.trigger is None else digest(result.trigger),
    }


def exactly(number: float) -> str:
    """As `float.hex` writes it, without the zeros at the end that a float32 has."""
    return re.sub(r"0+p", "p", number.hex())


def digest(trigger: np.ndarray) -> str:
    """SHA-256 of float32 values."""
    return hashlib.sha256(trigger.astype(np.float32).tobytes()).hexdigest()


# ---- exemplars and queries


def arrays(n: int, shape: tuple[int, int, int] = SHAPE, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images, noise of different strength and brightness; and labels. Whole numbers alone, alike everywhere."""
    rng = np.random.default_rng(seed)
    level, noise = rng.integers(0, 256, (n, shape[0], 1, 1)), rng.integers(0, 256, (n, *shape))
    strength = rng.integers(1, 5, (n, 1, 1, 1))
    images = ((level * (5 - strength) + noise * strength) // 5).astype(np.uint8)
    for twin in TWINS[1:]:
        if twin < n:
            images[twin] = images[TWINS[0]]
    return images, rng.integers(0, CLASSES, n)


def ids_of(n: int) -> list[str]:
    """Not in the order of rows."""
    return [f"e{7 * row % n:02}" for row in range(n)]


def source_of(n: int, **options: Any) -> ArraySource:
    """Exemplars with ids, class names and a column of metadata."""
    images, labels = arrays(n)
    return ArraySource(images, labels, ids=ids_of(n), metadata={"page": list(range(n))}, class_names=NAMES, **options)


def more(n: int, *, start: int) -> ArraySource:
    """Other exemplars, to add."""
    images, labels = arrays(n, seed=2)
    pages = list(range(start, start + n))
    return ArraySource(images, labels, ids=[f"m{page}" for page in pages], metadata={"page": pages})


def queries_of(engine: Engine, images: np.ndarray, ids: list[str]) -> list[Any]:
    """Two exemplars, one of them there several times; one darkened, one with noise upon it; and an image unseen."""
    rng = np.random.default_rng(1)
    darkened = images[5].astype(np.float32) / np.float32(255.0) * np.float32(0.4)
    noisy = np.clip(images[6].astype(np.int64) + rng.integers(-12, 13, images[6].shape), 0, 255).astype(np.uint8)
    unseen = arrays(1, images.shape[1:], seed=1000)[0][0]
    return [engine.exemplar(ids[2]), engine.exemplar(ids[TWINS[1]]), darkened, noisy, unseen]


# ---- groups of searches, each on engines of its own


def in_memory(_: Path) -> Iterator[Search]:
    """The network of conftest: convolution and batch norm."""
    images, labels = arrays(60)
    engine = Engine.from_arrays(
        images,
        labels,
        classifier_of(network()),
        ids=ids_of(60),
        class_names=NAMES,
        metadata={"page": list(range(60))},
        views=0,
        global_trigger="fast",
    )
    queries = queries_of(engine, images, ids_of(60))
    for options in (*NEAREST, *ROBUST, {"config": "paper"}, {"k": 100, "mode": "cosine", "where": "label = 1"}):
        yield search(engine, queries, options)
    for options in OWN_TRIGGER:
        yield search(engine, queries[2:], options)
    failing = [queries[0], np.zeros((3, 8, 9), np.uint8), queries[4]]
    yield search(engine, failing, {"mode": "l2"}, prefix="with a failure:")
    black = [np.zeros(SHAPE, np.uint8), queries[3]]
    for options in ({}, {"config": QUICK}, {"mode": "cosine", "stretch": True}):
        yield search(engine, black, options, prefix="with a black image:")


def without_labels(_: Path) -> Iterator[Search]:
    """Images as floats, channels last; labels are the model's; a head without a bias; an approximate FAISS index."""
    images, _labels = arrays(60)
    pixels = images.transpose(0, 2, 3, 1).astype(np.float32) / np.float32(255.0)
    classifier = classifier_of(network(bias=False, seed=1))
    engine = Engine.from_arrays(
        pixels, None, classifier, ids=ids_of(60), neighbours="SQ8", views=0, global_trigger=recipe("seed=5")
    )
    queries = queries_of(engine, images, ids_of(60))
    for options in (*A_FEW, {"config": "paper score=logit"}):
        yield search(engine, queries, options)


def residual(_: Path) -> Iterator[Search]:
    """A ResNet-18 for small images."""
    classifier = Classifier.from_architecture(
        "resnet18", image_shape=SHAPE, seed=0, num_classes=CLASSES, small_stem=True
    )
    yield from of_architecture(classifier, 30)


def transformer(_: Path) -> Iterator[Search]:
    """A small ViT: attention and layer norms."""
    yield from of_architecture(Classifier.from_module(small_vit(), image_shape=(3, 16, 16)), 24)


def small_vit() -> nn.Module:
    """Two layers of width 24, 4×4 patches; torchvision's would have a head of zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(16, 4, 2, 2, hidden_dim=24, mlp_dim=48, num_classes=CLASSES)
        nn.init.normal_(model.heads.head.weight)
    return model


def of_architecture(classifier: Classifier, n: int) -> Iterator[Search]:
    """The same searches whatever the model."""
    images, labels = arrays(n, classifier.image_shape)
    shared = recipe("trigger_steps=10")
    engine = Engine.from_arrays(images, labels, classifier, ids=ids_of(n), views=0, global_trigger=shared)
    queries = queries_of(engine, images, ids_of(n))
    for options in (*A_FEW[:4], {"recognition": False}, {"config": "paper trigger=fixed-patch tuning=discriminant"}):
        yield search(engine, queries, options)
    for options in (*A_FEW[4:], {"config": QUICK, "together": True}, {"config": f"{QUICK} tuning_lr=0.01 seed=3"}):
        yield search(engine, queries[2:], options)


def on_disk(folder: Path) -> Iterator[Search]:
    """An index built, added to, deleted from, compacted; and its first version."""
    path = folder / "golden.idx"
    shared = recipe("trigger_steps=30")
    build_index(source_of(40), path, classifier_of(network()), views=0, global_trigger=shared)
    with opened(path) as engine:
        queries = queries_of(engine, arrays(40)[0], ids_of(40))
        asked = [*A_FEW, {"where": "page >= 38 OR label = 1"}]
        yield from (search(engine, queries[1:], options, prefix="built:") for options in asked)
        engine.add(more(6, start=40))
        yield from (search(engine, queries[1:], options, prefix="added to:") for options in asked)
        engine.add(ArraySource(arrays(2, seed=3)[0], [0, 1], ids=["e05", "n1"]), replace=True)
        engine.delete(ids=["e02", "m41"])
        engine.delete(where="label = 2 AND page < 20")
        yield from (search(engine, queries[1:], options, prefix="deleted from:") for options in asked)
        engine.compact()
        yield from (search(engine, queries[1:], options, prefix="compacted:") for options in asked)
    with opened(path, version=1) as engine:
        yield from (search(engine, queries[3:], options, prefix="version 1:") for options in asked)


def in_bfloat16(folder: Path) -> Iterator[Search]:
    """The pass over the exemplars in bfloat16."""
    path = folder / "golden.idx"
    build_index(source_of(40), path, classifier_of(network()), views=0, global_trigger=recipe("trigger_steps=30"))
    with opened(path, precision="bf16") as engine:
        queries = queries_of(engine, arrays(40)[0], ids_of(40))
        for options in (*A_FEW[2:], {"config": "paper"}, {"config": QUICK, "recognition": 0.8}):
            yield search(engine, queries[1:], options)


def in_format_2(folder: Path) -> Iterator[Search]:
    """An index that the code of commit f543a6b wrote, in the format of then.

    `build_index` of `source_of(24)` with `tests.conftest:network` as architecture, then `add` of `more(4, start=24)`,
    then `delete` of e05.
    """
    path = Path(shutil.copytree(FORMAT_2, folder / FORMAT_2.name))
    for version, exemplars in ((1, 24), (None, 27)):
        with opened(path, version=version) as engine:
            assert len(engine) == exemplars
            queries = queries_of(engine, arrays(24)[0], ids_of(24))
            asked = [*A_FEW, {"where": "page > 20 OR label = 1"}, {"config": "paper trigger=fixed-patch"}]
            prefix = f"version {version or 'newest'}:"
            yield from (search(engine, queries[1:], options, prefix=prefix) for options in asked)


def opened(path: Path, **options: Any) -> Engine:
    """The network of conftest is code of ours, so it has to be given again."""
    return Engine.open(path, model=network(), device="cpu", **options)


GROUPS: dict[str, Callable[[Path], Iterator[Search]]] = {
    group.__name__: group
    for group in (in_memory, without_labels, residual, transformer, on_disk, in_bfloat16, in_format_2)
}

# ---- the record


def environment() -> dict[str, str]:
    """What rounding depends on."""
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def cpu_model() -> str:
    """As Linux names it."""
    about = Path("/proc/cpuinfo")
    if not about.is_file():
        return platform.processor()
    lines = [line.partition(":") for line in about.read_text().split("\n\n")[0].splitlines()]
    found = {key.strip(): value.strip() for key, _, value in lines}
    return ", ".join(f"{key} {found[key]}" for key in ("model name", "cpu family", "model") if key in found)


def record() -> dict[str, Any]:
    """All answers of today."""
    torch.set_num_threads(1)
    answers: dict[str, dict[str, Any]] = {}
    for name, group in GROUPS.items():
        with tempfile.TemporaryDirectory() as folder:
            searches = list(group(Path(folder)))
        answers[name] = {each.name: each.answers for each in searches}
        assert len(answers[name]) == len(searches), f"{name}: two searches have the same name"
    return {"environment": environment(), "answers": answers}


def write(recorded: dict[str, Any], path: Path) -> None:
    """JSON, a line for every search."""
    compact = partial(json.dumps, separators=(",", ":"))
    groups = {
        group: in_lines({name: compact(found) for name, found in answers.items()})
        for group, answers in recorded["answers"].items()
    }
    text = in_lines({"environment": json.dumps(recorded["environment"]), "answers": in_lines(groups)}) + "\n"
    assert json.loads(text) == recorded
    path.write_text(text)


def in_lines(members: dict[str, str]) -> str:
    """A JSON object, a line or more for every member."""
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {text}" for name, text in members.items()) + "\n}"


# ---- comparing where rounding is another


def hangs_on_rounding(group: str, options: dict[str, Any]) -> bool:
    """Whether a trigger was optimised for the answer, by many steps in float32 that amplify another CPU's rounding.

    The index's trigger counts, unless it was read from a file.
    """
    config = options.get("config", "robust")
    if options.get("mode", "tmm") != "tmm" or "trigger=fixed-patch" in config:
        return False
    own = "trigger=query" in config or (config.startswith("paper") and "trigger=global" not in config)
    return own or group != "in_format_2"


def same_shape(found: dict[str, Any], recorded: dict[str, Any]) -> bool:
    """The same keys, types and lengths."""
    return found.keys() == recorded.keys() and all(
        type(found[key]) is type(recorded[key])
        and (not isinstance(found[key], list) or key == "notes" or len(found[key]) == len(recorded[key]))
        for key in found
        if key != "recognised_as"
    )


def close(found: dict[str, Any], recorded: dict[str, Any], *, relative: float = 1e-3) -> bool:
    """The same exemplars with nearly the same scores; others only where scores nearly tie with the last."""
    if "failed" in recorded:
        return found == recorded
    if not same_shape(found, recorded):
        return False
    ours, theirs = scores_by_id(found), scores_by_id(recorded)
    tolerance = relative * max(1.0, *map(abs, theirs.values()))
    last = min(theirs.values())
    exact = ("query", "predicted", "recognised_as", "scored", "exemplars", "notes")
    return all(found[key] == recorded[key] for key in exact) and all(
        math.isclose(ours.get(id_, last), theirs.get(id_, last), rel_tol=0.0, abs_tol=tolerance)
        for id_ in ours.keys() | theirs.keys()
    )


def scores_by_id(answer: dict[str, Any]) -> dict[str, float]:
    """As floats again."""
    return dict(zip(answer["ids"], map(float.fromhex, answer["scores"]), strict=True))


if __name__ == "__main__":
    write(record(), RECORDED)
    print(f"wrote {RECORDED}")  # noqa: T201
