"""The commands of `engine bench` that measure how well exemplars are found. Nothing heavy is imported at first."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.options import check_folders, classifier_options, opened
from engine.options import joined

if TYPE_CHECKING:
    from bench.retrievers import Method
    from bench.suite import Suite
    from index.progress import Progress

BASELINES = "l2;cosine;robust"

suite_options = joined(
    classifier_options,
    click.option("--exemplars", type=click.IntRange(min=2), default=2000, show_default=True, help="A random subset."),
    click.option("--queries", type=click.IntRange(min=1), default=50, show_default=True, help="Random ones."),
    click.option(
        "--methods",
        default=BASELINES,
        show_default=True,
        help="Separated by semicolons: l2, cosine, a preset; with settings: 'cosine,stretch=true;paper,blend=added'.",
    ),
    click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="Neighbours looked at."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of subset, queries, noise."),
    click.option("--name", help="The data set's name in the report. Default: as the source calls itself."),
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        required=True,
        help="Records as JSON lines; a rerun goes on with them.",
    ),
)


@click.command()
@click.argument("source")
@suite_options
@click.option("--skip", type=click.IntRange(min=0), default=0, help="Leave out the first so many random queries.")
@click.option(
    "--families",
    default="brightness,gaussian,contrast,blur,jpeg,shift,pgd",
    show_default=True,
    help="Perturbations, separated by commas.",
)
@click.option(
    "--levels", multiple=True, metavar="FAMILY=L,L,…", help="Levels of a family instead of its own; repeatable."
)
def robustness(source: str, **options: Any) -> None:
    """Does a perturbed exemplar still find itself? Rank, overlap and labels against noise (Figs. 3, 6, §4.9).

    \b
    Examples:
      engine bench robustness mnist --root data --model resnet18 --weights mnist.safetensors --out runs/mnist.jsonl
      engine bench robustness cifar10/ --weights c.safetensors --model resnet18 --methods 'cosine;paper' \\
          --families brightness,gaussian --levels gaussian=1,2.5,5 --queries 20 --out runs/cifar.jsonl
    """
    from bench.self_retrieval import KEY, measure_self_retrieval
    from engine.display import progress_bar

    perturbations = parse_perturbations(options["families"], options["levels"])
    methods = parse_methods(options["methods"])
    check_folders(options["out"])
    with progress_bar() as progress:
        suite = load_suite(source, options, progress)
        queries = suite.queries(options["queries"], skip=options["skip"])
        with suite.records(options["out"], "robustness", methods, KEY, k=options["k"]) as records:
            measure_self_retrieval(
                suite.retrievers(methods, progress=progress),
                queries,
                suite.store,
                perturbations,
                records,
                classifier=suite.classifier,
                k=options["k"],
                seed=options["seed"],
                progress=progress,
            )
    click.echo(f"{options['out']}: {len(queries)} queries, {len(perturbations)} perturbations, {len(methods)} methods")


@click.command()
@click.argument("source")
@suite_options
@click.option("--directions", type=click.IntRange(min=1), default=2, show_default=True, help="Gaussian ones a query.")
@click.option("--kinds", default="gaussian,brightness,adversarial,feature,margin,seed", show_default=True)
@click.option("--skip", type=click.IntRange(min=0), default=0, help="Leave out the first so many random queries.")
def radius(source: str, **options: Any) -> None:
    """The robustness radius of Definition 1: how far a query can move before its top k changes (§3.4).

    \b
    Example:
      engine bench radius mnist --root data --model resnet18 --weights mnist.safetensors --queries 20 --out r.jsonl
    """
    import numpy as np

    from bench.radius import KEY, Kind, measure_radius
    from engine.display import progress_bar
    from index.errors import member

    kinds = [member(Kind, kind.strip()) for kind in options["kinds"].split(",")]
    methods = parse_methods(options["methods"])
    check_folders(options["out"])
    with progress_bar() as progress:
        suite = load_suite(source, options, progress)
        queries = suite.queries(options["queries"], skip=options["skip"])
        with suite.records(options["out"], "radius", methods, KEY, k=options["k"]) as records:
            measure_radius(
                suite.retrievers(methods, progress=progress),
                queries,
                suite.store.images(queries).astype(np.float32) / np.float32(255.0),
                suite.store.ids,
                records,
                classifier=suite.classifier,
                features=suite.store.features(np.arange(len(suite.store))),
                k=options["k"],
                kinds=kinds,
                directions=options["directions"],
                seed=options["seed"],
                progress=progress,
            )
    click.echo(f"{options['out']}: {len(queries)} queries, {len(methods)} methods")


def parse_methods(text: str) -> "list[Method]":
    """Of --methods."""
    from bench.retrievers import Method

    return [Method.parse(part.strip()) for part in text.split(";") if part.strip()]


def parse_perturbations(families: str, levels: tuple[str, ...]) -> "list[Any]":
    """Of --families and --levels."""
    from bench.noise import LEVELS, Family, standard_perturbations
    from index.errors import InputError, member

    chosen = [member(Family, name.strip()) for name in families.split(",")]
    own = dict(LEVELS)
    for text in levels:
        name, _, values = text.partition("=")
        try:
            own[member(Family, name.strip())] = tuple(float(value) for value in values.split(","))
        except ValueError:
            raise InputError(f"--levels {text}: expected FAMILY=LEVEL,LEVEL,…, as in gaussian=1,2.5") from None
    return standard_perturbations(chosen, levels=own)


def load_suite(source: str, options: dict[str, Any], progress: "Progress") -> "Suite":
    """Exemplars and classifier of `suite_options`."""
    from bench.suite import Suite

    images, classifier = opened(source, options)
    return Suite.load(
        images,
        classifier,
        exemplars=options["exemplars"],
        seed=options["seed"],
        data_set=options["name"],
        progress=progress,
    )
