"""Collections that are built over HTTP: there whole, or not at all."""

import base64
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.digits import make_classifier, write_photos, write_queries
from tests.serving import running
from tmm_engine import Engine, build_index
from tmm_engine.serving.keys import Keys, Right
from tmm_engine.serving.running import add_built, open_collections
from tmm_engine.serving.settings import Limits, Settings

READER, WRITER = {"api-key": "reading-key"}, {"api-key": "writing-key"}
KEYS = Keys((("reading-key", Right.READ), ("writing-key", Right.WRITE)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index, sources to build of, and a place for what is built."""
    folder = tmp_path_factory.mktemp("builds")
    (folder / "sources").mkdir()
    write_photos(folder / "sources" / "photos", count=30)
    write_photos(folder / "sources" / "many", count=400)
    write_photos(folder / "sources" / "junk", count=20)
    for number in range(20):
        (folder / "sources" / "junk" / "digit-3" / f"junk{number}.png").write_bytes(b"junk")
    build_index(folder / "sources" / "photos", folder / "photos.idx", make_classifier(), views=1)
    (folder / "built").mkdir()
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A digit, in base64."""
    folder = write_queries(tmp_path_factory.mktemp("queries"), count=1)
    return base64.b64encode(next(folder.iterdir()).read_bytes()).decode()


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    settings = Settings(keys=KEYS, builds=folder / "built", sources=folder / "sources")
    with running({"photos": folder / "photos.idx"}, settings) as client:
        client.headers.update(WRITER)
        yield client


def without_paths(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Hits, but for where their files lie: in an index that the server built, below its sources."""
    return [{name: value for name, value in hit.items() if name != "metadata"} for hit in answer["results"][0]["hits"]]


def ended(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """A job, once it is over."""
    while job["ended"] is None:
        time.sleep(0.05)
        job = client.get(f"/jobs/{job['id']}").json()
    return job


def test_a_collection_is_built_of_the_servers_images_and_searched(client: httpx.Client, folder: Path, image: str):
    asked = client.post("/collections", json={"name": "again", "like": "photos", "source": "photos", "views": 1})
    assert (asked.status_code, asked.json()["kind"], asked.json()["collection"]) == (202, "build", "again")
    assert asked.headers["location"] == f"/jobs/{asked.json()['id']}"
    job = ended(client, client.get(asked.headers["location"]).json())
    assert (job["state"], job["error"]) == ("done", None)
    assert (job["result"]["name"], job["result"]["exemplars"], job["result"]["skipped"]) == ("again", 30, [])
    assert [each["name"] for each in client.get("/collections").json()["collections"]] == ["photos", "again"]
    body = {"query": {"image": image}, "k": 3}
    first, second = (client.post(f"/collections/{name}/search", json=body).json() for name in ("photos", "again"))
    assert without_paths(first) == without_paths(second)  # of the same images by the same network
    assert second["results"][0]["hits"][0]["metadata"]["path"].startswith("photos/digit-")
    assert str(folder) not in client.get("/collections/again").text  # where the server has its files
    with running({"photos": folder / "photos.idx"}, built=folder / "built") as another:  # the next time
        third = another.post("/collections/again/search", json=body).json()
        assert third["results"][0]["hits"] == second["results"][0]["hits"]
    assert 'exemplars{collection="again"} 30' in client.get("/metrics").text
    taken = client.post("/collections", json={"name": "again", "like": "photos", "source": "photos"})
    assert (taken.status_code, "there is a collection 'again' already" in taken.json()["detail"]) == (409, True)


def test_a_collection_is_built_of_images_in_the_request(client: httpx.Client, folder: Path, image: str):
    broken = base64.b64encode(b"no image").decode()
    exemplars = [{"id": f"{n}.png", "image": image, "label": f"own {n % 2}"} for n in range(4)]
    asked = {"name": "own", "like": "photos", "exemplars": [*exemplars, {"id": "broken", "image": broken}], "views": 0}
    job = ended(client, client.post("/collections", json=asked).json())
    assert job["state"] == "done", job
    assert [each["query"] for each in job["result"]["skipped"]] == ["broken"]
    with Engine.open(folder / "built" / "own.idx", device="cpu") as engine:
        assert {engine.label_names[label] for label in engine.store.labels} == {"own 0", "own 1"}
    assert client.put("/collections/own/exemplars/new", json={"image": image}).status_code == 201


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"like": "photo"}, 404, "did you mean 'photos'"),
        ({"name": "../elsewhere"}, 422, "name"),
        ({"name": ""}, 422, "name"),
        ({"name": "photos"}, 409, "choose another name"),
        ({"source": "../photos.idx"}, 422, "among the server's sources"),
        ({"source": "/etc"}, 422, "among the server's sources"),
        ({"source": "none"}, 422, "among the server's sources"),
        ({"source": "a" * 300}, 422, "among the server's sources"),
        ({"source": "a\0b"}, 422, "among the server's sources"),
        ({"source": None, "exemplars": [{"id": "a", "image": ""}] * 2}, 422, "expected different ids, got 'a' 2 times"),
        ({"source": None}, 422, "expected either exemplars or a source, got none"),
        ({"exemplars": [{"id": "a", "image": "AAAA"}]}, 422, "expected either exemplars or a source, got both"),
        ({"views": 99}, 422, "views"),
        ({"views": True}, 422, "views: expected no truth value, got true"),
    ],
)
def test_what_cannot_be_built_is_refused_at_once(client: httpx.Client, changes: dict, status: int, words: str):
    refused = client.post("/collections", json={"name": "new", "like": "photos", "source": "photos"} | changes)
    assert (refused.status_code, refused.headers["content-type"]) == (status, "application/problem+json"), refused.text
    assert words in refused.json()["detail"]


def test_what_cannot_be_built_of_its_images_fails_and_leaves_nothing(client: httpx.Client, folder: Path):
    asked = {"name": "unknown", "like": "photos", "source": "photos"}
    unknown, too_few = {"recogniser": "no-such-layer"}, {"source": "junk", "neighbours": "IVF35,Flat"}
    for wrong, why in ((unknown, "no-such-layer"), (too_few, "needs 35")):
        job = ended(client, client.post("/collections", json=asked | wrong).json())
        assert job["state"] == "failed"
        assert why in job["error"]
        assert str(folder) not in job["error"]
        assert not (folder / "built" / "unknown.idx").exists()
        assert client.get("/collections/unknown").status_code == 404


def test_nothing_outside_of_the_sources_is_read_and_no_folder_of_the_server_told(client: httpx.Client, folder: Path):
    """Neither by a link within a folder nor by a table; images that cannot be read are named as clients know them."""
    outside = write_photos(folder / "outside", count=3)
    linked = write_photos(folder / "sources" / "linked", count=20)
    (linked / "more").symlink_to(outside, target_is_directory=True)
    asked = {"name": "linked", "like": "photos", "source": "linked", "views": 0}
    job = ended(client, client.post("/collections", json=asked).json())
    assert (job["state"], "expected nothing from outside of the server's sources" in job["error"]) == ("failed", True)
    assert not (folder / "built" / "linked.idx").exists()
    (folder / "sources" / "saved").mkdir()
    (folder / "sources" / "saved" / "dataset_dict.json").write_text('{"splits": ["../../outside"]}')
    asked = {"name": "saved", "like": "photos", "source": "saved", "views": 0}
    job = ended(client, client.post("/collections", json=asked).json())
    assert (job["state"], "expected splits that are folders beside it" in job["error"]) == ("failed", True)
    secret = next(outside.rglob("*.png"))
    inside = sorted((folder / "sources" / "photos").rglob("*.png"))[:20]
    lines = [f"photos/{path.parent.name}/{path.name},{path.parent.name}" for path in inside]
    lines += [f"{secret},digit-0", f"../outside/{secret.parent.name}/{secret.name},digit-0", "/etc/hostname,digit-0"]
    (folder / "sources" / "list.csv").write_text("\n".join(["path,label", *lines, "photos/none.png,digit-0"]) + "\n")
    asked = {"name": "listed", "like": "photos", "source": "list.csv", "views": 0}
    job = ended(client, client.post("/collections", json=asked).json())
    assert (job["state"], job["result"]["exemplars"]) == ("done", 20), job
    reasons = [each["error"] for each in job["result"]["skipped"]]
    assert len(reasons) == 4
    assert reasons[:3] == ["lies outside of the folder that images may come from"] * 3
    told = client.get("/collections/listed/exemplars").text
    assert str(folder) not in told + str(reasons)
    assert f'"path":"photos/{inside[0].parent.name}/{inside[0].name}"' in told.replace(" ", "")


def test_a_name_that_is_served_is_not_built_over(client: httpx.Client, folder: Path):
    """Even where its folder has been removed by hand before a build that was asked for earlier."""
    asked = {"name": "removed", "like": "photos", "source": "photos", "views": 0}
    long = {"like": "photos", "source": "many", "views": 10}
    names = ("busy-before", "removed", "busy-between", "removed")
    jobs = [client.post("/collections", json=(asked if name == "removed" else long) | {"name": name}) for name in names]
    before, first, between, second = (job.json() for job in jobs)
    client.delete(f"/jobs/{before['id']}")
    assert ended(client, first)["state"] == "done"
    shutil.rmtree(folder / "built" / "removed.idx")
    assert client.post("/collections", json=asked).status_code == 409
    client.delete(f"/jobs/{between['id']}")
    last = ended(client, second)
    assert (last["state"], last["error"]) == (
        "failed",
        "there is a collection 'removed' already; choose another name",
    )
    assert not (folder / "built" / "removed.idx").exists()


def test_of_two_builds_of_one_name_the_first_stays_whole(client: httpx.Client, folder: Path):
    asked = {"name": "twice", "like": "photos", "source": "photos", "views": 1}
    busy = client.post("/collections", json={"name": "busy", "like": "photos", "source": "many", "views": 10}).json()
    jobs = [client.post("/collections", json=asked).json() for _ in range(2)]  # both wait
    client.delete(f"/jobs/{busy['id']}")
    assert [ended(client, job)["state"] for job in jobs] == ["done", "failed"]
    with Engine.open(folder / "built" / "twice.idx", device="cpu") as engine:
        assert len(engine) == 30
    assert client.post("/collections/twice/search", json={"query": {"id": "digit-3/0003.png"}}).status_code == 200


def test_what_was_left_by_a_killed_build_or_cannot_be_opened_is_not_served(folder: Path, tmp_path: Path):
    (tmp_path / ".x.idx.building").mkdir()
    (tmp_path / "notes").mkdir()
    shutil.copytree(folder / "photos.idx", tmp_path / "whole.idx")
    shutil.copytree(folder / "photos.idx", tmp_path / "photos.idx")
    (tmp_path / "broken.idx").mkdir()
    collections = open_collections({"photos": folder / "photos.idx"}, device="cpu", limits=Limits())
    left_out = add_built(collections, tmp_path)
    assert list(collections) == ["photos", "whole"]
    assert [line.split(" is not served: ")[1][:30] for line in left_out] == [
        f"{tmp_path / 'broken.idx'} is not"[:30],
        "another collection is called '",
    ]
    collections.close()


def test_a_build_that_is_cancelled_leaves_nothing(client: httpx.Client, folder: Path):
    asked = {"name": "cancelled", "like": "photos", "source": "many", "views": 10}
    job = client.post("/collections", json=asked).json()
    while client.get(f"/jobs/{job['id']}").json()["state"] == "queued":
        time.sleep(0.01)
    client.delete(f"/jobs/{job['id']}")
    assert ended(client, job)["state"] == "cancelled"
    assert not [path for path in (folder / "built").iterdir() if "cancelled.idx" in path.name and path.is_dir()]
    assert client.get("/collections/cancelled").status_code == 404


def test_who_may_only_read_builds_nothing(client: httpx.Client):
    asked = {"name": "new", "like": "photos", "source": "photos"}
    assert client.post("/collections", json=asked, headers=READER).status_code == 403


def test_a_server_that_builds_nothing_says_how_it_would(folder: Path):
    asked = {"name": "new", "like": "photos", "source": "photos"}
    with running({"photos": folder / "photos.idx"}) as client:
        refused = client.post("/collections", json=asked)
        assert (refused.status_code, "engine serve --builds" in refused.json()["detail"]) == (403, True)
    with running({"photos": folder / "photos.idx"}, Settings(builds=folder / "built")) as client:
        refused = client.post("/collections", json=asked)
        assert (refused.status_code, "engine serve --sources" in refused.json()["detail"]) == (403, True)
