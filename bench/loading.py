"""What the commands of `engine bench` load before they measure: exemplars, a classifier, held-out queries."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from tmm_engine.backends import choose_device
from tmm_engine.bench.methods import Method
from tmm_engine.bench.noise import Family, Perturbation, parse, standard_perturbations
from tmm_engine.bench.suite import Suite
from tmm_engine.bench.triggers import folder_beside
from tmm_engine.cli.options import opened_source
from tmm_engine.index.errors import InputError, member
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.models.preprocessing import Target
from tmm_engine.index.progress import Progress
from tmm_engine.index.sources.adapted import AdaptedSource
from tmm_engine.index.sources.opening import open_source
from tmm_engine.index.sources.records import ImageRecord, ImageSource


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Exemplars, and queries that are none of them.

    Attributes:
        suite: The exemplars.
        source: Where the queries are from.
        class_names: In label order, where they are known.
        queries: In [0, 1].
        labels: Of the queries.
    """

    suite: Suite
    source: str
    class_names: tuple[str, ...] | None
    queries: Float32[np.ndarray, "q c h w"]
    labels: Int64[np.ndarray, "q"]


def opened(source: str, options: dict[str, Any]) -> tuple[ImageSource, Classifier]:
    """The source and the classifier that the options name."""
    images = opened_source(source, options)
    classifier = Classifier.from_architecture(
        options["model"],
        image_shape=images.natural_shape(),
        weights=options["weights"],
        mean=options["mean"],
        std=options["std"],
    )
    return in_classes(images, classifier), classifier.to(choose_device(options["device"]))


def in_classes(source: ImageSource, classifier: Classifier) -> ImageSource:
    """The source with its labels as numbers of the model's classes, by name; as it is where they have other names."""
    adapted = AdaptedSource.of_new_index(source, classifier.class_names, named=classifier.names_given)
    return source if adapted.labels.vocabulary.others else adapted


def parse_methods(text: str) -> list[Method]:
    """Of --methods."""
    if not (names := [part.strip() for part in text.split(";") if part.strip()]):
        raise InputError("--methods: expected at least one, got none (try 'l2;cosine;robust')")
    return [Method.parse(name) for name in names]


def parse_perturbations(families: str, levels: tuple[str, ...]) -> list[Perturbation]:
    """Of --families and --levels."""
    chosen = [member(Family, name.strip()) for name in families.split(",")]
    own: dict[Family, tuple[float, ...]] = {}
    for text in levels:
        name, _, values = text.partition("=")
        try:
            own[member(Family, name.strip())] = tuple(float(value) for value in values.split(","))
        except ValueError:
            raise InputError(f"--levels {text}: expected FAMILY=LEVEL,LEVEL,…, as in gaussian=1,2.5") from None
    return standard_perturbations(chosen, levels=own)


def parse_few(text: str) -> list[Perturbation]:
    """Of --perturbations."""
    return [parse(part) for part in text.split(",")]


def load_suite(source: str, options: dict[str, Any], progress: Progress) -> Suite:
    """Exemplars and classifier of the options that `sized` declares."""
    return suite_of(*opened(source, options), options, progress)


def suite_of(
    images: ImageSource,
    classifier: Classifier,
    options: dict[str, Any],
    progress: Progress,
    *,
    embedded: bool = True,
) -> Suite:
    """The same, of a source and a classifier that are open."""
    out = options["out"]  # none for a dry run
    return Suite.load(
        images,
        classifier,
        exemplars=options["exemplars"],
        seed=options["seed"],
        data_set=options["name"],
        triggers=out and folder_beside(out),
        embedded=embedded,
        progress=progress,
    )


def load_held_out(source: str, options: dict[str, Any], progress: Progress, *, embedded: bool = True) -> HeldOut:
    """Exemplars as every benchmark draws them; queries are the beginning of a seeded permutation of the others.

    Without `embedded` the exemplars have no features (`Suite.load`).

    Raises:
        InputError: the queries are not held out, have no labels or other classes, or are too few.
    """
    images, classifier = opened(source, options)
    others = in_classes(_query_source(source, options), classifier)
    if not others.labelled:
        raise InputError(f"{others.name}: expected labelled queries, got none with a label (class folders have them)")
    if images.class_names != others.class_names and None not in (images.class_names, others.class_names):
        raise InputError(f"{others.name}: expected queries of the classes of {images.name}, got other classes")
    records = _readable(others, classifier.target)
    if options["queries"] > len(records):
        raise InputError(f"expected at most {len(records)} queries from {others.name}, got {options['queries']}")
    rows = np.random.default_rng(options["seed"]).permutation(len(records))[: options["queries"]]
    queries = np.stack([records[row].image for row in rows]).astype(np.float32) / np.float32(255.0)
    labels = np.array([records[row].label for row in rows], dtype=np.int64)
    suite = suite_of(images, classifier, options, progress, embedded=embedded)
    return HeldOut(suite, others.name, images.class_names, queries, labels)


def _query_source(source: str, options: dict[str, Any]) -> ImageSource:
    own, split = options["query_source"], options["query_split"]
    if own is not None:
        return open_source(own, split=split, root=options["root"])
    split = split or "test"
    if split == (options["split"] or "train"):
        raise InputError(f"expected queries that are no exemplars, got both from {split}: choose another --query-split")
    try:
        return open_source(source, split=split, root=options["root"])
    except InputError as error:
        raise InputError(f"no held-out queries: {error}; or name other images with --query-source") from None


def _readable(source: ImageSource, shape: Target) -> list[ImageRecord]:
    return [record for record in source.read(shape) if isinstance(record, ImageRecord)]
