"""`engine bench serve`: its parts in short, on a few digits."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.digits import make_classifier, write_photos, write_queries
from tests.serving import running
from tmm_engine import Engine, build_index
from tmm_engine.bench.serving import kills
from tmm_engine.bench.serving.contract import measure_contract
from tmm_engine.bench.serving.load import BUSY, OK, at_rate, one_by_one, several_clients
from tmm_engine.cli.main import main
from tmm_engine.serving.settings import Limits, Settings


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench-serve")
    write_photos(folder / "photos", count=12)
    build_index(folder / "photos", folder / "photos.idx", make_classifier(), views=1)
    return folder / "photos.idx"


def test_a_flood_is_answered_or_put_off_and_what_is_accepted_is_counted(index: Path, tmp_path: Path):
    [query] = write_queries(tmp_path, count=1).iterdir()
    images = [query.read_bytes()]
    with running({"photos": index}, Settings(limits=Limits(waiting=1, batch=1))) as client:
        address = f"{client.base_url}/collections/photos/search"
        assert [each.status for each in one_by_one(address, images, 3)] == [OK] * 3
        flood = at_rate(address, images, rate=400.0, seconds=0.5)
        assert len(flood) == 200
        assert {each.status for each in flood} == {OK, BUSY}
        assert OK in {each.status for each in several_clients(address, images, clients=4, seconds=0.2)}


@pytest.mark.slow
def test_the_description_holds_for_its_own_examples(index: Path):
    with running({"photos": index}) as client:
        found = measure_contract(str(client.base_url), "photos", examples=1, seconds=60, phases="examples")
    assert found.failures.total() == 0, found.failures
    assert found.cases > 10


def test_what_was_answered_for_and_is_not_there_is_lost(index: Path):
    with Engine.open(index, device="cpu") as engine:
        ids = {str(id_) for id_ in engine.store.ids}
    removed, *kept = sorted(ids)
    told = kills.Told(there={"a/0", "a/1"}, gone={removed}, asked={"a/1"})
    assert kills._judged(index, ids, told)["lost"] == 2  # a/0 is not there, and what was removed is
    assert kills._judged(index, set(kept), kills.Told(asked={removed}))["lost"] == 0
    assert kills._judged(index, set(kept), kills.Told())["lost"] == 1  # more than anybody asked for


@pytest.mark.slow
def test_every_part_runs_and_nothing_breaks(index: Path, tmp_path: Path):
    short = {"pairs": 3, "rounds": 1, "seconds": 0.5, "overload": 2, "examples": 2, "cases": 40, "kills": 3}
    options = [text for name, value in short.items() for text in (f"--{name}", str(value))]
    asked = ["bench", "serve", str(index), "--json", "--out", str(tmp_path / "r.jsonl"), *options]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    for name in ("overload_errors", "schema_failures", "hostile_failures", "lost"):
        assert figures[name] == 0
    assert figures["changes"] > 0
    parts = {json.loads(line).get("part") for line in (tmp_path / "r.jsonl").read_text().splitlines()[1:-1]}
    assert parts == {"overhead", "throughput", "unloaded", "overload", "contract", "hostile", "kill", "page"}
