"""Calls every public function with arguments of wrong kinds. A program of its own: in tests beartype would be first.

python -m tests.misuse        writes what ends in an error that is not the project's, one line each
"""

import contextlib
import dataclasses
import inspect
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import tmm_engine
import tmm_engine.index
from tests.conftest import SHAPE, network
from tmm_engine import Engine, Query, SearchOptions
from tmm_engine.index import ArraySource, Classifier, TmmEngineError

WRONG = (
    None, "", "text", "a\0b", b"", b"bytes", [], ["text"], [None], {}, 0, -1, 1.5, np.array([]), Path("gone"), Path(),
    Classifier, object(),
)  # fmt: skip
OURS = (
    "BuildReport", "Classifications", "ExemplarStore", "ImageSource", "Kind", "MemoryStore", "Metric", "Mode",
    "Neighbours", "Prefilter", "SearchResults", "Classifier.features", "Classifier.known_as", "Classifier.logits",
)  # fmt: skip
"""Public names that nobody calls with values of their own, or that are called too often to look at each time."""

Calls = dict[str, tuple[Callable[..., object], dict[str, Any]]]


def calls() -> Calls:
    """Public callables by name, each with arguments that it can do with; everything happens in the current folder."""
    images, labels = np.random.default_rng(0).integers(0, 256, (6, *SHAPE), dtype=np.uint8), np.arange(6) % 4
    classifier = Classifier.from_module(network(), image_shape=SHAPE)
    source = ArraySource(images, labels)
    for name in ("a.idx", "b.idx"):
        tmm_engine.build_index(source, name, classifier, views=0)
    engine = Engine.open("a.idx", model=network())
    shown = {"results": [engine.search(images[0], mode="l2", k=2)], "path": "shown"}
    classifier.save("w.safetensors")
    arrays = {"images": images, "labels": labels}
    build = {"source": source, "index": "c.idx", "classifier": classifier, "overwrite": True, "views": 0}

    def search(**given: Any) -> object:
        return engine.search(Query(**given), mode="l2")

    return {
        "ArraySource": (ArraySource, arrays),
        "Classifier.from_architecture": (
            Classifier.from_architecture,
            {"architecture": "tests.conftest:network", "image_shape": SHAPE, "weights": "w.safetensors"},
        ),
        "Classifier.from_module": (Classifier.from_module, {"model": network(), "image_shape": SHAPE}),
        "Classifier.known_as": (classifier.known_as, {"stored": classifier.fingerprint}),
        "Classifier.load": (Classifier.load, {"path": "w.safetensors", "model": network()}),
        "Classifier.save": (classifier.save, {"path": "saved.safetensors"}),
        "Classifier.to": (classifier.to, {"device": "cpu"}),
        "Engine.add": (engine.add, {"source": source, "replace": True}),
        "Engine.audit": (engine.audit, {"kinds": ["labels"]}),
        "Engine.calibrate": (engine.calibrate, {"source": ArraySource(images[:, :, ::-1], labels), "mode": "l2"}),
        "Engine.classify": (engine.classify, {"query": images[0], "mode": "l2"}),
        "Engine.compact": (engine.compact, {}),
        "Engine.copies_of": (engine.copies_of, {"images": [images[0]]}),
        "Engine.delete": (engine.delete, {"where": "label = 3"}),
        "Engine.exemplar": (engine.exemplar, {"id_": "00000001"}),
        "Engine.from_arrays": (Engine.from_arrays, arrays | {"classifier": classifier, "views": 0}),
        "Engine.matching": (engine.matching, {"where": "label = 1"}),
        "Engine.open": (Engine.open, {"path": "b.idx", "model": network()}),
        "Engine.relabel": (engine.relabel, {"labels": {"00000001": "new"}}),
        "Engine.search": (engine.search, {"query": images[0], "mode": "l2"}),
        "Engine.search_each": (engine.search_each, {"queries": [images[0]], "mode": "l2"}),
        "Engine.sync": (engine.sync, {"source": source, "dry_run": True}),
        "Engine.tune_neighbours": (engine.tune_neighbours, {"k": 1, "factories": ["Flat"], "sample": 2}),
        "Engine.to_arrow": (engine.to_arrow, {"columns": ["image"]}),
        "Query": (search, {"name": "q", "pixels": np.zeros(SHAPE, np.float32), "label": 0}),
        "SearchOptions": (SearchOptions, {"mode": "l2"}),
        "build_index": (tmm_engine.build_index, build),
        "decode_image": (tmm_engine.index.decode_image, {"source": images[0]}),
        "open_source": (tmm_engine.index.open_source, {"source": "gone"}),
        "repair_index": (tmm_engine.repair_index, {"index": "a.idx", "model": network()}),
        "settled": (tmm_engine.index.settled, {"readings": {"a": classifier, "b": classifier}, "source": source}),
        "verify_index": (tmm_engine.verify_index, {"index": "a.idx", "model": network()}),
        "write_audit": (
            tmm_engine.write_audit,
            {"audit": engine.audit(kinds=["labels"]), "engine": engine, "folder": "audit", "overwrite": True},
        ),
        "write_html": (tmm_engine.write_html, shown),
        "write_parquet": (tmm_engine.write_parquet, shown),
        "write_png": (tmm_engine.write_png, shown),
    }


def public() -> Iterator[str]:
    """Every public function, class and method that is called with something."""
    for name in (*tmm_engine.__all__, *tmm_engine.index.__all__):
        value = getattr(tmm_engine, name, None) or getattr(tmm_engine.index, name)
        if isinstance(value, type) and issubclass(value, Exception):
            continue
        if value in (Engine, Classifier):
            methods = {key: getattr(found, "__func__", found) for key, found in vars(value).items() if key[0] != "_"}
            yield from (
                f"{name}.{key}"
                for key, found in methods.items()
                if inspect.isfunction(found) and len(inspect.signature(found).parameters) > 1
            )
        elif not dataclasses.is_dataclass(value) or value in (Query, SearchOptions):  # the others are results
            yield name


def failures() -> Iterator[str]:
    """What ends in an error that is not the project's."""
    options = [field.name for field in dataclasses.fields(SearchOptions)]
    for name, (function, valid) in calls().items():
        parameters = inspect.signature(function).parameters.values()
        named = [each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]
        for argument in {*named, *valid, *(options if "mode" in valid else ())} - {"progress", "given"}:
            for wrong in WRONG:
                try:
                    function(**valid | {argument: wrong})
                except TmmEngineError:
                    pass
                except Exception as error:
                    yield f"{name}({argument}={wrong!r}): {type(error).__name__}: {str(error)[:100]}"
        with contextlib.suppress(TmmEngineError):
            function(**valid)


def main() -> None:
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        os.chdir(folder)
        warnings.simplefilter("error")
        try:
            for missing in {*public()} - {*OURS, *calls()}:
                sys.stdout.write(f"{missing} is not tried\n")
            os.chdir(tempfile.mkdtemp(dir=folder))
            for failure in failures():
                sys.stdout.write(f"{failure}\n")
        finally:
            os.chdir(home)


if __name__ == "__main__":
    main()
