"""What each choice in TMM-NN is worth: one setting at a time is moved away from a base (Figs. 7–10, §4.8).

Configurations that share trigger and pass are computed together. Exemplars are put in the suite's seeded order first:
a smaller set is then the beginning of a larger one, and a query has the same row, and so the same noise, in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import click
import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from tmm_engine.bench.attack import features_of
from tmm_engine.bench.benchmark import Benchmark, Reported, Run, Sheet
from tmm_engine.bench.loading import load_suite, parse_few
from tmm_engine.bench.methods import Method
from tmm_engine.bench.noise import Perturbation
from tmm_engine.bench.options import check_folders, k_option, out_option, perturbations_option, sized
from tmm_engine.bench.records import RecordFile
from tmm_engine.bench.retrievers import Retriever
from tmm_engine.bench.self_retrieval import KEY, measure_self_retrieval
from tmm_engine.bench.suite import Suite
from tmm_engine.bench.tables import count, grouped, mean, plain_text, rate, table
from tmm_engine.cli.display import progress_bar
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


@click.command("ablation")
@click.argument("source")
@sized(exemplars=1000, queries=5)
@k_option
@click.option("--base", default="paper", show_default=True, help="The preset that is varied, one setting at a time.")
@click.option("--set", "base_settings", multiple=True, metavar="NAME=VALUE", help="Changed in the base; repeatable.")
@click.option("--settings", help="Which settings, separated by commas. Default: all that matter to the base.")
@click.option(
    "--layers", is_flag=True, help="Instead: which layers are tuned, by the slow reference. For tiny sizes only."
)
@perturbations_option
@out_option
def command(source: str, **options: Any) -> None:
    """What is each choice in TMM-NN worth? One setting at a time is moved away from a base (Figs. 7–10, §4.8).

    \b
    Examples:
      engine bench ablation mnist --root data --model resnet18 --weights mnist.safetensors --out ablation.jsonl
      engine bench ablation mnist --root data --model resnet18 --weights mnist.safetensors --base robust \\
          --settings fusion,shrinkage,exemplars --exemplars 2000 --queries 20 --out runs/robust.jsonl
      engine bench ablation mnist --root data --model resnet18 --weights mnist.safetensors --layers \\
          --set tuning_batch=32 --exemplars 200 --queries 1 --perturbations 'gaussian 2.5' --out runs/layers.jsonl
    """
    perturbations = parse_few(options["perturbations"])
    base = Method.parse(",".join((options["base"], *options["base_settings"])))
    chosen = [name.strip() for name in options["settings"].split(",")] if options["settings"] else None
    variants_of(base, chosen, exemplars=options["exemplars"])  # whatever is wrong with them, before images are read
    check_folders(options["out"])
    with progress_bar() as progress:
        suite = load_suite(source, options, progress)
        if options["layers"]:
            variants = layer_variants(base, suite.classifier)
        else:
            variants = variants_of(base, chosen, exemplars=len(suite.store))
        methods = [variant.method for variant in variants]
        suite.queries(options["queries"])  # too many fail before there is a file
        with suite.records(options["out"], "ablation", methods, KEY, k=options["k"]) as records:
            measure_ablation(
                suite,
                variants,
                perturbations,
                records,
                queries=options["queries"],
                k=options["k"],
                progress=progress,
            )
    click.echo(f"{options['out']}: {options['queries']} queries, {len(variants)} configurations")


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
            sizes = [int(value) for value in VALUES[EXEMPLARS] if int(value) < exemplars]
            variants += [
                Variant(setting, size, replace(base, name=f"{base.name}; {size} exemplars"), size) for size in sizes
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
    for size, group in groups.items():
        part = beginning(suite, size)
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


def section(run: Run, _: Sheet) -> list[str]:
    """A row for each value of each setting."""
    rows = []
    for (setting, value, method), cell in grouped(run.records, "setting", "value", "method").items():
        clean = [record for record in cell if record["perturbation"] == "clean"]
        noisy = [record for record in cell if record["perturbation"] != "clean"]
        rows.append(
            {
                "setting": setting,
                "value": plain_text(value),
                "method": method,
                "queries": str(count(cell)),
                "MRR, clean": mean(clean, "reciprocal_rank"),
                "MRR, noise": mean(noisy, "reciprocal_rank"),
                "top-1, noise": rate([record["rank"] == 0 for record in noisy], noisy),
                "label precision, noise": mean(noisy, "label_precision"),
            }
        )
    return [table(rows)]


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


FIELDS = ("setting", "value", "query", "perturbation", "method", "rank", "reciprocal_rank", "label_precision")
BENCHMARK = Benchmark(command, Reported("Ablation", KEY, FIELDS, section))
