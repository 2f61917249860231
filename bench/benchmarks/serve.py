"""What does HTTP cost, and what holds under load, hostile requests and kills? The command."""

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from tmm_engine.bench.benchmark import Benchmark
from tmm_engine.bench.machine import describe_machine
from tmm_engine.bench.options import check_folders
from tmm_engine.cli.display import progress_bar
from tmm_engine.cli.output import echo_json
from tmm_engine.index.errors import IndexStateError
from tmm_engine.index.progress import Progress

PARTS = ("speed", "contract", "hostile", "kills", "page")
AT_MOST = {
    "overhead_ms": 3.0,
    "overload_errors": 0,
    "overload_p99_ratio": 5.0,
    "schema_failures": 0,
    "hostile_failures": 0,
    "lost": 0,
    "page_ms": 400,
    "axe_serious": 0,
}
AT_LEAST = {"throughput_ratio": 0.8, "schema_cases": 2000, "kills": 50, "changes": 50}


@click.command("serve")
@click.argument("index", type=click.Path(path_type=Path))
@click.option("--only", default=",".join(PARTS), show_default=True, metavar="PART,…", help="What is measured.")
@click.option("--pairs", type=click.IntRange(min=1), default=100, show_default=True, help="Requests one by one.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Of 16 clients, and of lists.")
@click.option("--seconds", type=float, default=8.0, show_default=True, help="Of each of these.")
@click.option("--overload", type=float, default=60.0, show_default=True, help="Seconds at twice what it can.")
@click.option("--queue", type=click.IntRange(min=1), default=4, show_default=True, help="Images that may wait then.")
@click.option("--examples", type=click.IntRange(min=1), default=60, show_default=True, help="Of each operation.")
@click.option("--cases", type=click.IntRange(min=1), default=300, show_default=True, help="Hostile requests.")
@click.option("--kills", type=click.IntRange(min=1), default=50, show_default=True, help="Servers killed.")
@click.option("--drops", type=click.IntRange(min=1), default=20, show_default=True, help="Pictures on the page.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Raw records as JSON lines.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def command(index: Path, *, only: str, as_json: bool, out: Path | None, **options: Any) -> None:
    """What does HTTP cost, and what holds under load, hostile requests and kills? Over loopback.

    Speed is measured on INDEX; what may break something, on a small index of digits. Exit code 1 if anything broke.

    \b
    Examples:
      engine bench serve mnist.idx --json --out serve.jsonl
      engine bench serve photos.idx --only kills,hostile --kills 5 --cases 50
    """
    parts = [part.strip() for part in only.split(",")]
    if unknown := [part for part in parts if part not in PARTS]:
        raise click.UsageError(f"--only: expected some of {', '.join(PARTS)}, got {unknown[0]}")
    check_folders(out)
    figures: dict[str, float] = {}
    records: list[dict[str, Any]] = []
    with progress_bar() as progress, tempfile.TemporaryDirectory(prefix="bench-serve-") as folder:
        for part in parts:
            found, raw = MEASURES[part](index, Path(folder), options, progress)
            figures |= found
            records += raw
    if out is not None:
        settings = {"settings": options | {"parts": parts, "index": index.name, "machine": describe_machine()}}
        out.write_text("".join(f"{json.dumps(each)}\n" for each in (settings, *records, {"figures": figures})))
    _show(figures, as_json=as_json)


Measured = tuple[dict[str, float | int], list[dict[str, Any]]]


def _speed(index: Path, folder: Path, options: dict[str, Any], progress: Progress) -> Measured:
    from tmm_engine.bench.serving.speed import measure_speed

    names = ("pairs", "rounds", "seconds", "overload", "queue")
    found = measure_speed(index, progress=progress, **{name: options[name] for name in names})
    return found.figures, found.records


def _contract(index: Path, folder: Path, options: dict[str, Any], progress: Progress) -> Measured:
    from tmm_engine.bench.serving.contract import measure_contract
    from tmm_engine.bench.serving.process import served
    from tmm_engine.serving.settings import Settings

    progress("schemathesis", 0, 1)
    (builds := folder / "built").mkdir(exist_ok=True)
    with served({"digits": _digits(folder)}, Settings(builds=builds, sources=folder)) as server:
        found = measure_contract(server.address, "digits", examples=options["examples"], seconds=1800)
        crashed = not server.alive
    progress("schemathesis", 1, 1)
    failures = found.failures.total() + crashed
    return {"schema_failures": failures, "schema_cases": found.cases}, found.records()


def _hostile(index: Path, folder: Path, options: dict[str, Any], progress: Progress) -> Measured:
    from tmm_engine.bench.serving.hostile import measure_hostile
    from tmm_engine.bench.serving.process import served

    with served({"digits": _digits(folder)}) as server:
        found = measure_hostile(server, "digits", cases=options["cases"], seed=options["seed"], progress=progress)
    return {"hostile_failures": sum(each["failed"] for each in found), "hostile_cases": len(found)}, found


def _kills(index: Path, folder: Path, options: dict[str, Any], progress: Progress) -> Measured:
    from tmm_engine.bench.serving.kills import measure_kills
    from tmm_engine.digits import load_digits
    from tmm_engine.views.showing import as_picture, png_bytes

    image = png_bytes(as_picture(load_digits()[0][100][None]))
    found = measure_kills(
        _digits(folder), folder, image, kills=options["kills"], seed=options["seed"], progress=progress
    )
    counted = {"lost": sum(each["lost"] for each in found), "kills": len(found)}
    return counted | {"changes": sum(each["added"] + each["removed"] for each in found)}, found


def _page(index: Path, folder: Path, options: dict[str, Any], progress: Progress) -> Measured:
    from tmm_engine.bench.serving.page import measure_page

    return measure_page(index, drops=options["drops"], seed=options["seed"], progress=progress)


MEASURES = {"speed": _speed, "contract": _contract, "hostile": _hostile, "kills": _kills, "page": _page}


def _digits(folder: Path) -> Path:
    """A small index, made once."""
    from tmm_engine.building import build_index
    from tmm_engine.digits import load_digits
    from tmm_engine.index.models.classifier import Classifier
    from tmm_engine.index.sources.arrays import ArraySource

    path = folder / "digits.idx"
    if not path.exists():
        images, labels = load_digits()
        classifier = Classifier.from_architecture(
            "resnet18", image_shape=(1, 8, 8), seed=0, num_classes=10, small_stem=True
        )
        source = ArraySource(images[:30], labels[:30], class_names=[str(digit) for digit in range(10)])
        build_index(source, path, classifier, views=1)
    return path


def _show(figures: dict[str, float], *, as_json: bool) -> None:
    held = {name: figures[name] <= bar for name, bar in AT_MOST.items() if name in figures}
    held |= {name: figures[name] >= bar for name, bar in AT_LEAST.items() if name in figures}
    bars = AT_MOST | AT_LEAST
    if as_json:
        told = {name: {"value": figures[name], "bar": bars[name], "holds": ok} for name, ok in held.items()}
        echo_json(figures | {"bars": told})
    else:
        for name, value in figures.items():
            bar = f" (bar {bars[name]:g}: {'holds' if held[name] else 'DOES NOT HOLD'})" if name in held else ""
            click.echo(f"{name.replace('_', ' ')}: {value:.4g}{bar}")
    broken = [
        name
        for name in ("overload_errors", "schema_failures", "hostile_failures", "lost", "axe_serious")
        if figures.get(name)
    ]
    if broken:
        raise IndexStateError(f"{', '.join(broken)}: see the records")


BENCHMARK = Benchmark(command)
