"""Builds by workers of a Ray cluster are those of one process, whoever is killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.conftest import SHAPE, classifier_of
from tests.ray_network import Watched, processes
from tmm_engine import Engine, RayOptions, build_index, verify_index
from tmm_engine.cluster.identity import Identity
from tmm_engine.index import ArraySource, Classifier
from tmm_engine.index.errors import ImageError, IndexStateError, InputError, ModelError
from tmm_engine.index.store.manifest import EXEMPLARS

ROOT = Path(__file__).parents[1]
COUNT = 1300  # three batches of the network, so three parts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, one image that cannot be read."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number in range(COUNT // 2):
            pixels = rng.integers(0, 256, (9, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:04}.png")
    (folder / "cat" / "0100.png").write_bytes(b"not an image")
    return folder


def rows(index: Path, model: object) -> object:
    """All that is stored of all exemplars."""
    with Engine.open(index, model=model) as engine:
        return engine.to_arrow(columns=["image", *engine.store.feature_columns])


def images_of(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (COUNT, *SHAPE), dtype=np.uint8)


def arrays(seed: int = 0) -> ArraySource:
    labels = [None if number % 7 == 0 else number % 4 for number in range(COUNT)]
    return ArraySource(images_of(seed), labels, name=f"seed {seed}", metadata={"page": [*range(COUNT)]})


def test_folders_are_built_bit_for_bit_as_by_one_process(
    ray: ModuleType, tmp_path: Path, photographs: Path, classifier: Classifier, make_network: Callable[[], object]
) -> None:
    told: list[tuple[str, int, int]] = []
    options = {"views": 2, "global_trigger": "fast"}
    alone = build_index(photographs, tmp_path / "alone.idx", classifier, **options)
    together = build_index(
        photographs,
        tmp_path / "together.idx",
        classifier,
        **options,
        ray=True,
        progress=lambda step, done, total: told.append((step, done, total)),
    )
    assert replace(together, remarks=together.remarks[:-1]) == alone
    assert together.remarks[-1] == "embedded by 2 workers of Ray with 1 CPU each, on 1 machine"
    assert together.skipped_count == 1
    assert [done for step, done, _ in told if step == "building"][-1] == COUNT
    expected, found = (rows(tmp_path / name, make_network()) for name in ("alone.idx", "together.idx"))
    assert found.equals(expected)
    assert verify_index(tmp_path / "together.idx", model=make_network()).sound
    query = photographs / "dog" / "0007.png"
    with (
        Engine.open(tmp_path / "alone.idx", model=make_network()) as one,
        Engine.open(tmp_path / "together.idx", model=make_network()) as two,
    ):
        for mode in ("robust", "l2", "tmm"):
            hits = [[(hit.id, hit.score) for hit in engine.search(query, mode=mode).hits] for engine in (one, two)]
            assert hits[0] == hits[1]


def test_arrays_with_metadata_and_missing_labels(ray: ModuleType, tmp_path: Path, classifier: Classifier, make_network):
    reports = [
        build_index(arrays(), tmp_path / f"{ray_too}.idx", classifier, views=1, ray=ray_too)
        for ray_too in (False, True)
    ]
    assert reports[0] == replace(reports[1], remarks=reports[1].remarks[:-1])
    assert any("have no label" in remark for remark in reports[1].remarks)
    assert rows(tmp_path / "True.idx", make_network()).equals(rows(tmp_path / "False.idx", make_network()))


def test_a_killed_worker_is_replaced_and_nothing_is_doubled(ray: ModuleType, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    network = Watched(seen, seconds=0.5)
    classifier = classifier_of(network)
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            time.sleep(0.05)
            for process in processes(seen):
                os.kill(process, signal.SIGKILL)
                killed.append(process)
                return

    build_index(arrays(), tmp_path / "alone.idx", classifier, views=0)
    killer = threading.Thread(target=kill)
    killer.start()
    report = build_index(arrays(), tmp_path / "together.idx", classifier, views=0, ray=True)
    killer.join()
    assert report.remarks[-1].endswith("; 1 lost on the way and replaced, their work done again")
    assert len(processes(seen)) >= 2
    assert killed[0] != os.getpid()
    assert rows(tmp_path / "together.idx", network).equals(rows(tmp_path / "alone.idx", network))
    assert verify_index(tmp_path / "together.idx", model=network).sound
    files = {path.name for path in (tmp_path / "together.idx" / EXEMPLARS / "data").iterdir()}
    assert len(files) == 3


DRIVER = """
import sys
from pathlib import Path
from tests.test_engine_cluster_building import *
import ray
ray.init(sys.argv[1], configure_logging=False, log_to_driver=False)
network = Watched(Path(sys.argv[3]), seconds=1.0)
build_index(arrays(1), sys.argv[2], classifier_of(network), views=0, overwrite=True, ray=True)
"""


@pytest.mark.parametrize("there", [True, False])
def test_a_killed_driver_leaves_the_old_index_or_none(ray: ModuleType, tmp_path: Path, there: bool) -> None:
    seen, index = tmp_path / "seen", tmp_path / "x.idx"
    seen.mkdir()
    network = Watched(seen, seconds=1.0)
    if there:
        build_index(arrays(), index, classifier_of(network), views=0)
    before = rows(index, network) if there else None
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, address, str(index), str(seen)], cwd=ROOT)
    while not processes(seen):
        assert driver.poll() is None
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    if there:
        assert rows(index, network).equals(before)
    else:
        assert not index.exists()
    build_index(arrays(2), index, classifier_of(network), views=0, overwrite=there)
    with Engine.open(index, model=network) as engine:
        assert engine.manifest.source == "seed 2"
    assert verify_index(index, model=network).sound


def test_images_that_no_worker_survives_are_named(ray: ModuleType, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    with pytest.raises(IndexStateError, match=r"3 workers were lost at images \d"):
        build_index(
            arrays(), tmp_path / "x.idx", classifier_of(Watched(seen, deadly=True)), views=0, ray=RayOptions(cpus=2)
        )
    assert {path.name for path in tmp_path.iterdir()} <= {"seen", ".x.idx.lock"}
    assert len(processes(seen)) == 3


def test_what_stops_one_process_stops_workers(ray: ModuleType, tmp_path: Path, photographs: Path, classifier) -> None:
    with pytest.raises(ImageError, match=r"0100.png: .*strict"):
        build_index(photographs, tmp_path / "x.idx", classifier, views=0, strict=True, ray=True)
    beyond = ArraySource(images_of(), [9] * COUNT)
    with pytest.raises(InputError, match="label 9, but the model's head has 4 classes"):
        build_index(beyond, tmp_path / "x.idx", classifier, views=0, ray=True)
    assert not (tmp_path / "x.idx").exists()


def test_workers_of_another_version_or_model_are_refused(
    ray: ModuleType, tmp_path: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"makes the model \w+… of .*, not 000000000000…: its code is another there"):
        build_index(arrays(), tmp_path / "x.idx", replace(classifier, fingerprint="0" * 64), views=0, ray=True)
    own = Identity.own()
    monkeypatch.setattr(Identity, "own", lambda: Identity(own.versions | {"torch": "1.0"}))
    with pytest.raises(IndexStateError, match=r"a Ray worker on .* has torch .* instead of 1.0: .*Nothing was changed"):
        build_index(arrays(), tmp_path / "x.idx", classifier, views=0, ray=True)
    assert not (tmp_path / "x.idx").exists()


def test_more_cpus_than_there_are(ray: ModuleType, tmp_path: Path, classifier: Classifier) -> None:
    with pytest.raises(InputError, match="no worker with 3 CPUs fits on any machine, the largest has 2"):
        build_index(arrays(), tmp_path / "x.idx", classifier, views=0, ray=RayOptions(cpus=3))
