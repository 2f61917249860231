"""What does a second machine bring? The same build by one process on one core, and by two Ray nodes of one core each.

Both nodes are on this machine, which needs two cores; the process that reads the source and commits shares them. The
single process is held to one core. The network is a ResNet-18 of random weights, which takes as long as a trained one.
"""

import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch

from tmm_engine.bench.benchmark import Benchmark
from tmm_engine.bench.machine import describe_machine
from tmm_engine.bench.options import check_folders
from tmm_engine.bench.photographs import write_photographs
from tmm_engine.building import build_index
from tmm_engine.cli.display import progress_bar
from tmm_engine.cluster.connection import needs_ray
from tmm_engine.engine import Engine
from tmm_engine.index.errors import InputError
from tmm_engine.index.models.classifier import Classifier
from tmm_engine.index.progress import Progress
from tmm_engine.index.sources.folders import FolderSource

SHAPE = (3, 96, 96)
NODES = 2


@click.command("ray")
@click.option("--photographs", type=click.IntRange(min=50), default=1500, show_default=True, help="640×480, JPEG.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Builds of each kind.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write raw seconds, machine and versions.")
def command(photographs: int, repeats: int, json_path: Path | None) -> None:
    """What does a second machine bring? A build by two Ray nodes of a core each, beside one process on one core.

    \b
    Examples:
      engine bench ray --json ray.json
      engine bench ray --photographs 200 --repeats 1
    """
    check_folders(json_path)
    with progress_bar() as progress:
        record = measure_ray(photographs, repeats, progress)
    text = json.dumps(record, indent=1)
    if json_path:
        json_path.write_text(text + "\n", encoding="utf-8")
    click.echo(json.dumps({"ray_build_over_single": record["ray_build_over_single"]}))


def measure_ray(photographs: int, repeats: int, progress: Progress) -> dict[str, Any]:
    """Seconds of both builds in turn, and the median of their ratios; both indexes have to hold the same.

    Raises:
        InputError: Ray is not installed, or this machine has only one core.
    """
    needs_ray()
    if len(os.sched_getaffinity(0)) < NODES:
        raise InputError(f"expected a machine with {NODES} cores, got 1: nothing could be shared")
    torch.set_num_threads(1)
    classifier = Classifier.from_architecture("resnet18", image_shape=SHAPE, seed=0, num_classes=10)
    seconds: dict[str, list[float]] = {"single": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder, _cluster() as address:
        source = FolderSource(write_photographs(Path(folder) / "photographs", photographs))
        alone, together = Path(folder) / "alone.idx", Path(folder) / "together.idx"
        for number in range(repeats):
            progress("rounds", number, repeats)
            with _one_core():
                seconds["single"].append(_timed(lambda: build_index(source, alone, classifier, overwrite=True)))
            seconds["ray"].append(
                _timed(lambda: build_index(source, together, classifier, overwrite=True, ray=address))
            )
        _check_same(alone, together)
    ratios = [ray / single for ray, single in zip(seconds["ray"], seconds["single"], strict=True)]
    return {
        "ray_build_over_single": statistics.median(ratios),
        "ratios": ratios,
        "seconds": seconds,
        "photographs": photographs,
        "image_shape": SHAPE,
        "nodes": NODES,
        "load_average": os.getloadavg(),
        "machine": describe_machine(),
    }


@contextmanager
def _cluster() -> Iterator[str]:
    """The address of a cluster with two nodes of one core each."""
    from ray.cluster_utils import Cluster

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lance is not fork-safe")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            for _ in range(NODES - 1):
                cluster.add_node(num_cpus=1)
            yield cluster.address
        finally:
            cluster.shutdown()


@contextmanager
def _one_core() -> Iterator[None]:
    """This thread, and those that it starts, run on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _timed(build: Callable[[], object]) -> float:
    start = time.perf_counter()
    build()
    return time.perf_counter() - start


def _check_same(alone: Path, together: Path) -> None:
    """What is faster has to be the same."""
    with Engine.open(alone) as one, Engine.open(together) as two:
        columns = ["image", *one.store.feature_columns]
        if not one.to_arrow(columns=columns).equals(two.to_arrow(columns=columns)):
            raise AssertionError("the two indexes hold different rows")


BENCHMARK = Benchmark(command)
