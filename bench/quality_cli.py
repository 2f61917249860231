"""The commands of `engine bench` that measure how well exemplars find themselves. They import nothing heavy."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tmm_engine.bench.options import check_folders, query_options, sized
from tmm_engine.cli.options import joined
from tmm_engine.index.errors import InputError, member

if TYPE_CHECKING:
    from tmm_engine.bench.noise import Perturbation
    from tmm_engine.bench.retrievers import Method

BASELINES = "l2;cosine;robust"
FEW_PERTURBATIONS = "clean,brightness 0.5,gaussian 2.5,gaussian 5"


methods_option = click.option(
    "--methods",
    default=BASELINES,
    show_default=True,
    help="Separated by semicolons: l2, cosine, a preset; with settings: 'cosine,stretch=true;paper,blend=added'.",
)
k_option = click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="Neighbours looked at.")
out_option = click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Records as JSON lines; a rerun goes on with them. Global triggers are kept beside them, in .triggers.",
)
perturbations_option = click.option(
    "--perturbations",
    default=FEW_PERTURBATIONS,
    show_default=True,
    help="Of the queries, each a family and a level, separated by commas.",
)
suite_options = joined(sized(exemplars=2000, queries=50), methods_option, k_option, out_option)


@click.command()
@click.argument("source")
@suite_options
@click.option("--skip", type=click.IntRange(min=0), default=0, help="Leave out the first so many random queries.")
@click.option(
    "--families",
    default="brightness,gaussian,contrast,blur,jpeg,shift,pgd",
    show_default=True,
    help="Perturbations, separated by commas. Two are attacks: pgd, one for all methods, moves the plain features; "
    "adaptive, one for each method and as slow, moves what that method ranks by (it does not aim at recognition).",
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
    from tmm_engine.bench.loading import load_suite
    from tmm_engine.bench.self_retrieval import KEY, measure_self_retrieval
    from tmm_engine.cli.display import progress_bar

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
@click.option(
    "--kinds",
    default="gaussian,brightness,adversarial,adaptive,feature,margin,seed",
    show_default=True,
    help="Of radius, separated by commas. Two lead straight to an attack's end: adversarial, on the plain features; "
    "adaptive, on what the method ranks by.",
)
@click.option("--skip", type=click.IntRange(min=0), default=0, help="Leave out the first so many random queries.")
@click.option("--held-out", is_flag=True, help="Queries that are no exemplars, instead of exemplars.")
@query_options
def radius(source: str, **options: Any) -> None:
    """The robustness radius of Definition 1: how far a query can move before its top k changes (§3.4).

    \b
    Examples:
      engine bench radius mnist --root data --model resnet18 --weights mnist.safetensors --queries 20 --out r.jsonl
      engine bench radius mnist --root data --model resnet18 --weights mnist.safetensors --held-out --out held.jsonl
    """
    import numpy as np

    from tmm_engine.bench.loading import load_held_out, load_suite
    from tmm_engine.bench.radius import KEY, Kind, measure_radius
    from tmm_engine.cli.display import progress_bar

    _check_queries(options)
    kinds = [member(Kind, kind.strip()) for kind in options["kinds"].split(",")]
    methods = parse_methods(options["methods"])
    check_folders(options["out"])
    with progress_bar() as progress:
        if options["held_out"]:
            held = load_held_out(source, options, progress)
            suite, images, numbers = held.suite, held.queries, np.arange(len(held.queries))
            names, about = [f"{held.source} {number}" for number in numbers], {"query_source": held.source}
        else:
            suite, about = load_suite(source, options, progress), {}
            numbers = suite.queries(options["queries"], skip=options["skip"])
            names = suite.store.ids[numbers].tolist()
            images = suite.store.images(numbers).astype(np.float32) / np.float32(255.0)
        with suite.records(options["out"], "radius", methods, KEY, k=options["k"], **about) as records:
            measure_radius(
                suite.retrievers(methods, progress=progress),
                images,
                names,
                suite.store.ids,
                records,
                classifier=suite.classifier,
                features=suite.store.features(np.arange(len(suite.store))),
                k=options["k"],
                numbers=numbers,
                kinds=kinds,
                directions=options["directions"],
                seed=options["seed"],
                progress=progress,
            )
    click.echo(f"{options['out']}: {len(images)} queries, {len(methods)} methods")


def _check_queries(options: dict[str, Any]) -> None:
    held_out = options["held_out"]
    for name in ("query_split", "query_source"):
        if options[name] is not None and not held_out:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --held-out: without it queries are exemplars")
    if held_out and options["skip"]:
        raise click.UsageError("--skip leaves out exemplars as queries: with --held-out there are none")


@click.command()
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
def ablation(source: str, **options: Any) -> None:
    """What is each choice in TMM-NN worth? One setting at a time is moved away from a base (Figs. 7–10, §4.8).

    \b
    Examples:
      engine bench ablation mnist --root data --model resnet18 --weights mnist.safetensors --out ablation.jsonl
      engine bench ablation mnist --root data --model resnet18 --weights mnist.safetensors --base robust \\
          --settings fusion,shrinkage,exemplars --exemplars 2000 --queries 20 --out runs/robust.jsonl
      engine bench ablation mnist --root data --model resnet18 --weights mnist.safetensors --layers \\
          --set tuning_batch=32 --exemplars 200 --queries 1 --perturbations 'gaussian 2.5' --out runs/layers.jsonl
    """
    from tmm_engine.bench.ablation import layer_variants, measure_ablation, variants_of
    from tmm_engine.bench.loading import load_suite
    from tmm_engine.bench.retrievers import Method
    from tmm_engine.bench.self_retrieval import KEY
    from tmm_engine.cli.display import progress_bar

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


@click.command()
@click.argument("source")
@suite_options
@click.option("--foreign", required=True, metavar="OTHER", help="Images that do not belong: a source, or 'noise'.")
@click.option("--foreign-split", metavar="SPLIT", help="Split of OTHER. Default: train.")
@click.option("--foreign-root", type=click.Path(path_type=Path), help="Where OTHER is, if it is a data set's name.")
@click.option("--foreign-count", type=click.IntRange(min=1), default=500, show_default=True, help="A random subset.")
@perturbations_option
def ood(source: str, **options: Any) -> None:
    """How often does a foreign exemplar outrank the true one? Beside it, the paper's bound (§3.4.6).

    OTHER is brought to the shape of SOURCE; 'noise' means images of uniform noise.

    \b
    Examples:
      engine bench ood mnist --root data --model resnet18 --weights mnist.safetensors --foreign noise --out noise.jsonl
      engine bench ood mnist --root data --model resnet18 --weights mnist.safetensors --foreign cifar10/ \\
          --methods 'cosine;paper' --queries 20 --out runs/foreign.jsonl
    """
    from tmm_engine.bench.loading import load_suite
    from tmm_engine.bench.ood import KEY, NOISE, foreign_images, measure_foreign, mixed, noise_images
    from tmm_engine.bench.retrievers import make_retrievers
    from tmm_engine.cli.display import progress_bar
    from tmm_engine.index.sources.opening import open_source

    perturbations, methods = parse_few(options["perturbations"]), parse_methods(options["methods"])
    check_folders(options["out"])
    other, count, seed = options["foreign"], options["foreign_count"], options["seed"]
    where = {"split": options["foreign_split"], "root": options["foreign_root"]}
    foreign = None if other == NOISE else open_source(other, **where)
    with progress_bar() as progress:
        suite = load_suite(source, options, progress)
        shape, queries = suite.classifier.image_shape, suite.queries(options["queries"])
        if foreign is None:
            images = noise_images(count, shape, seed=seed)
        else:
            images = foreign_images(foreign, count, shape, seed=seed, progress=progress)
        store = mixed(suite, images)
        with suite.records(options["out"], "ood", methods, KEY, foreign_count=len(images)) as records:
            measure_foreign(
                make_retrievers(methods, suite.classifier, store, triggers=suite.triggers, progress=progress),
                queries,
                store,
                perturbations,
                records,
                foreign=foreign.name if foreign else NOISE,
                foreign_count=len(images),
                classifier=suite.classifier,
                seed=seed,
                progress=progress,
            )
    click.echo(f"{options['out']}: {len(queries)} queries, {len(images)} foreign exemplars, {len(methods)} methods")


def parse_methods(text: str) -> "list[Method]":
    """Of --methods."""
    from tmm_engine.bench.retrievers import Method

    if not (names := [part.strip() for part in text.split(";") if part.strip()]):
        raise InputError("--methods: expected at least one, got none (try 'l2;cosine;robust')")
    return [Method.parse(name) for name in names]


def parse_perturbations(families: str, levels: tuple[str, ...]) -> "list[Perturbation]":
    """Of --families and --levels."""
    from tmm_engine.bench.noise import Family, standard_perturbations

    chosen = [member(Family, name.strip()) for name in families.split(",")]
    own: dict[Family, tuple[float, ...]] = {}
    for text in levels:
        name, _, values = text.partition("=")
        try:
            own[member(Family, name.strip())] = tuple(float(value) for value in values.split(","))
        except ValueError:
            raise InputError(f"--levels {text}: expected FAMILY=LEVEL,LEVEL,…, as in gaussian=1,2.5") from None
    return standard_perturbations(chosen, levels=own)


def parse_few(text: str) -> "list[Perturbation]":
    """Of --perturbations."""
    from tmm_engine.bench.noise import parse

    return [parse(part) for part in text.split(",")]
