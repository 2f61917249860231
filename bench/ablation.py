"""What each choice in TMM-NN is worth: one setting at a time is moved away from a base (Figs. 7–10, §4.8).

Configurations that share trigger and pass are computed together. Exemplars are put in the suite's seeded order first:
a smaller set is then the beginning of a larger one, and a query has the same row, and so the same noise, in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from tmm_engine.bench.attack import features_of
from tmm_engine.bench.noise import Perturbation
from tmm_engine.bench.records import RecordFile
from tmm_engine.bench.retrievers import Method, Retriever
from tmm_engine.bench.self_retrieval import measure_self_retrieval
from tmm_engine.bench.suite import Suite
from tmm_engine.index.errors import InputError, nearest
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress, silent
from tmm_engine.index.store.memory import MemoryStore
from tmm_engine.rerank.reference import reference_scores
from tmm_engine.rerank.settings import Blend, IndexTrigger, Score, TmmConfig, Trigger, TunedHead, Tuning, canonical

EXEMPLARS = "exemplars"
VALUES: dict[str, tuple[str, ...]] = {
    "trigger": tuple(Trigger),
    "blend": tuple(Blend),
    "clamp": ("true", "false"),
    "score": tuple(Score),
    "stretch": ("false", "true"),
    "tuning": tuple(Tuning),
    "fusion": ("0", "1", "2", "4", "8", "16"),
    "recognition": ("none", "0.6", "0.7", "0.8", "0.9"),
    "intensity": ("none", "0.05", "0.1", "0.25", "0.5"),
    "shrinkage": ("0.01", "0.1", "1", "10"),
    "tuning_epochs": ("1", "2", "5", "10"),
    "tuning_lr": ("1e-4", "1e-3", "1e-2"),
    "ewc_lambda": ("0", "1", "10", "100"),
    EXEMPLARS: ("250", "500", "1000"),  # and all of them, which is the base
}
"""The values that each setting takes, as `TmmConfig.with_settings` reads them."""

LAYERS = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True, slots=True)
class Variant:
    """One configuration of an ablation.

    Attributes:
        setting: What is moved; ``base`` for the base itself.
        value: To where.
        method: The configuration, under a name that no other variant has.
        exemplars: On how many; None is all.
        layers: Modules of the backbone that are tuned with the head, by the slow reference; None is the fast path.
    """

    setting: str
    value: str | int | float | bool
    method: Method
    exemplars: int | None = None
    layers: tuple[str, ...] | None = None


class ReferenceRetriever:
    """The slow, literal TMM-NN: the only one that can tune backbone layers beside the head (§4.8.2)."""

    def __init__(self, name: str, config: TmmConfig, layers: tuple[str, ...], suite: Suite) -> None:
        self.name, self._config, self._layers, self._classifier = name, config, layers, suite.classifier
        rows, device = np.arange(len(suite.store)), suite.classifier.device
        self._images = torch.from_numpy(suite.store.images(rows)).to(device)
        self._labels = torch.from_numpy(suite.store.labels).to(device)

    def scores(self, query: Float32[np.ndarray, "c h w"], *, seed: int = 0) -> Float[np.ndarray, "n"]:
        """As `Retriever`."""
        pixels = torch.from_numpy(query).to(self._images.device)
        config = self._config.with_seed(self._config.seed + seed)
        return reference_scores(
            self._classifier, pixels, self._images, self._labels, config, tune_layers=self._layers
        ).scores

    def embedding(self, pixels: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """φ(x): the trigger is the query's own and is not differentiated through; layers are as before the tuning."""
        return features_of(self._classifier)(pixels)


def variants_of(base: Method, settings: Sequence[str] | None, *, exemplars: int) -> list[Variant]:
    """The base, then one variant for each other value of each setting.

    Epochs bring the least number of steps with them: ten epochs are ten times the base's ``tuning_min_steps``, for on
    few exemplars that, and not the epochs, is what counts.

    Args:
        base: A configuration of TMM-NN.
        settings: Of `VALUES`; None takes all that the base's tuning looks at.
        exemplars: How many there are; numbers of exemplars are those below.

    Raises:
        InputError: the base is a metric, a setting is unknown, or the base's tuning does not look at it.
    """
    config = _config_of(base)
    if settings is None:
        felt = config.to_json()
        settings = [name for name in VALUES if name == EXEMPLARS or canonical(name) in felt]
    variants = [Variant("base", base.name, base)]
    for setting in dict.fromkeys(settings):
        if setting not in VALUES:
            raise InputError(f"unknown setting {setting!r}{nearest(setting, VALUES)}; known: {', '.join(VALUES)}")
        if setting == EXEMPLARS:
            counts = [int(value) for value in VALUES[EXEMPLARS] if int(value) < exemplars]
            variants += [
                Variant(setting, count, replace(base, name=f"{base.name}; {count} exemplars"), count)
                for count in counts
            ]
            continue
        for value in VALUES[setting]:
            method = base.varied(f"{setting}={value}", *_steps(config, setting, value))
            if method.config != config:
                chosen = _config_of(method).to_json()[canonical(setting)]
                variants.append(Variant(setting, "none" if chosen is None else chosen, method))
    return variants


def layer_variants(base: Method, classifier: Classifier) -> list[Variant]:
    """The head alone, and with each of `LAYERS`; all by the slow reference, for it alone tunes layers.

    Raises:
        InputError: the model has no such layers, or the reference cannot do what the base asks for.
    """
    config = _config_of(base)
    if isinstance(config.trigger, IndexTrigger) or not isinstance(config.head, TunedHead) or config.rank.fusion:
        raise InputError(
            f"layers: expected a base without global trigger, fusion and closed form, such as paper, got "
            f"{base.name}: the slow reference, which alone tunes layers, has none of these"
        )
    modules = dict(classifier.backbone.named_modules())
    if missing := [layer for layer in LAYERS if f"network.{layer}" not in modules]:
        raise InputError(
            f"layers: expected a model with {', '.join(LAYERS)}, as a ResNet has, but {classifier.spec.architecture} "
            f"has no {missing[0]}"
        )
    chosen: dict[str, tuple[str, ...]] = {"head": ()}
    chosen |= {f"head + {layer}": (f"network.{layer}",) for layer in LAYERS}
    return [
        Variant("layers", value, replace(base, name=f"{base.name}; {value}"), layers=layers)
        for value, layers in chosen.items()
    ]


def measure_ablation(
    suite: Suite,
    variants: Sequence[Variant],
    perturbations: Sequence[Perturbation],
    record_file: RecordFile,
    *,
    queries: int,
    k: int = 10,
    progress: Progress = silent,
) -> None:
    """Self-retrieval of every variant: records as `measure_self_retrieval`'s, with ``setting`` and ``value``.

    Args:
        suite: Exemplars and classifier.
        variants: From `variants_of` or `layer_variants`.
        perturbations: Beside the clean query.
        record_file: Opened with `bench.self_retrieval.KEY`.
        queries: How many; the same for all variants.
        k: Neighbours looked at.
        progress: Told of global triggers and searches.

    Raises:
        InputError: more queries than the smallest set has exemplars, or no such k.
    """
    groups: dict[int, list[Variant]] = {}
    for variant in variants:
        groups.setdefault(variant.exemplars or len(suite.store), []).append(variant)
    fewest = min(groups)
    if max(queries, k + 1) > fewest:
        raise InputError(
            f"expected at most {fewest} queries and k below that, for the smallest set has {fewest} exemplars, got "
            f"{queries} queries and k = {k} (leave out the setting {EXEMPLARS!r}, or ask for less)"
        )
    for count, group in groups.items():
        part = beginning(suite, count)
        extra: dict[str, dict[str, Any]] = {
            variant.method.name: {"setting": variant.setting, "value": variant.value} for variant in group
        }
        measure_self_retrieval(
            _retrievers(group, part, progress),
            part.queries(queries),
            part.store,
            perturbations,
            record_file,
            classifier=suite.classifier,
            k=k,
            seed=suite.seed,
            extra=extra,
            progress=progress,
        )


def beginning(suite: Suite, exemplars: int) -> Suite:
    """The suite of the first exemplars in its order, which become rows 0, 1, 2, … and queries in that order."""
    rows, store = suite.order[:exemplars], suite.store
    part = MemoryStore(
        store.images(rows),
        {name: store.features(rows, column=name) for name in store.feature_columns},
        store.labels[rows],
        ids=[str(id_) for id_ in store.ids[rows]],
    )
    return replace(suite, store=part, order=np.arange(len(rows)))


def _retrievers(group: Sequence[Variant], suite: Suite, progress: Progress) -> list[Retriever]:
    fast = suite.retrievers([variant.method for variant in group if variant.layers is None], progress=progress)
    slow = [
        ReferenceRetriever(variant.method.name, _config_of(variant.method), variant.layers, suite)
        for variant in group
        if variant.layers is not None
    ]
    return [*fast, *slow]


def _config_of(method: Method) -> TmmConfig:
    if method.config is None:
        raise InputError(f"expected a preset to change settings of, got {method.name} (try --base paper)")
    return method.config


def _steps(config: TmmConfig, setting: str, value: str) -> tuple[str, ...]:
    """The setting that a number of epochs brings with it."""
    if setting != "tuning_epochs" or not isinstance(config.head, TunedHead):
        return ()
    return (f"tuning_min_steps={config.head.min_steps * int(value) // max(config.head.epochs, 1)}",)
