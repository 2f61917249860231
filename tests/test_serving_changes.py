"""Changes over HTTP: exemplars that come and go, long work, and an index that changes under the server."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.digits import make_classifier, write_photos, write_queries
from tests.serving import running
from tmm_engine import Engine, build_index
from tmm_engine.serving.jobs import Jobs, JobState
from tmm_engine.serving.keys import Keys, Right
from tmm_engine.serving.settings import Settings

READER, WRITER = {"api-key": "reading-key"}, {"api-key": "writing-key"}
KEYS = Keys((("reading-key", Right.READ), ("writing-key", Right.WRITE)))
PHOTOS = "/collections/photos"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changing")
    write_photos(folder / "photos", count=30)
    build_index(folder / "photos", folder / "photos.idx", make_classifier(), views=1)
    return folder / "photos.idx"


@pytest.fixture(scope="module")
def query(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = write_queries(tmp_path_factory.mktemp("queries"), count=1)
    return next(folder.iterdir()).read_bytes()


@pytest.fixture(scope="module")
def client(index: Path) -> Iterator[httpx.Client]:
    with running({"photos": index}, Settings(keys=KEYS)) as client:
        client.headers.update(WRITER)
        yield client


def ended(client: httpx.Client, job: dict) -> dict:
    """A job, once it is over."""
    while job["ended"] is None:
        time.sleep(0.05)
        job = client.get(f"/jobs/{job['id']}").json()
    return job


def nearest(client: httpx.Client, image: bytes) -> str:
    answer = client.post(f"{PHOTOS}/search", content=image, headers={"content-type": "image/png"}, params={"k": 1})
    return answer.json()["results"][0]["hits"][0]["id"]


def test_an_exemplar_comes_is_replaced_and_goes(client: httpx.Client, index: Path, query: bytes):
    address = f"{PHOTOS}/exemplars/new/own one.png"
    raw = {"content": query, "headers": {"content-type": "image/png"}}
    added = client.put(address, **raw, params={"label": "digit-7"})
    assert (added.status_code, added.json()["added"], added.json()["exemplars"]) == (201, 1, 31)
    assert nearest(client, query) == "new/own one.png"
    body = {"image": base64.b64encode(query).decode(), "label": "mine", "metadata": {"path": "elsewhere"}}
    replaced = client.put(address, json=body)
    assert (replaced.status_code, replaced.json()["replaced"]) == (200, 1)
    found = client.get(address).json()
    assert (found["class_name"], found["metadata"]) == ("mine", {"path": "elsewhere"})
    assert client.put(address, files={"image": query}, data={"label": "digit-1"}).status_code == 200
    with Engine.open(index, device="cpu") as engine:
        assert len(engine) == 31
    deleted = client.delete(address)
    assert (deleted.status_code, deleted.json()["deleted"]) == (200, 1)
    assert nearest(client, query) != "new/own one.png"
    assert client.get(address).status_code == client.delete(address).status_code == 404


def test_what_cannot_become_an_exemplar_is_refused_and_changes_nothing(client: httpx.Client, query: bytes):
    before = client.get(PHOTOS).json()["version"]
    address = f"{PHOTOS}/exemplars/odd"
    image = base64.b64encode(query).decode()
    refused = [
        client.put(address, json={"image": base64.b64encode(b"?").decode()}),
        client.put(address, json={"image": image, "metadata": {"unknown": 1}}),
        client.put(address, files={"picture": query}),
        client.put(address, json={"image": image, "metadata": {"path": 3}}),
    ]
    refused += [client.put(address, json={"image": image, "label": label}) for label in ("", " ", "a\nb", "\x1b[31m")]
    refused += [client.put(address, content=query, headers={"content-type": "image/png"}, params={"label": "a\rb"})]
    for odd in ("", "a\nb", "a/../b", "."):
        refused.append(client.post(f"{PHOTOS}/exemplars", json={"exemplars": [{"id": odd, "image": image}]}))
    assert {each.status_code for each in refused} == {422}, [each.text for each in refused]
    assert client.get(PHOTOS).json()["version"] == before


def test_many_come_as_json_alone(client: httpx.Client, query: bytes):
    body = json.dumps({"exemplars": [{"id": "own", "image": base64.b64encode(query).decode()}]})
    plain = client.post(f"{PHOTOS}/exemplars", content=body, headers={"content-type": "text/plain"})
    assert (plain.status_code, plain.json()["detail"]) == (415, "expected a body of application/json, got 'text/plain'")


def test_only_a_key_to_write_with_may_change(client: httpx.Client, query: bytes):
    address = f"{PHOTOS}/exemplars/digit-3/0003.png"
    changes = [
        lambda headers: client.put(address, content=query, headers={"content-type": "image/png"} | headers),
        lambda headers: client.delete(address, headers=headers),
        lambda headers: client.post(f"{PHOTOS}/refresh", headers=headers),
        lambda headers: client.post(f"{PHOTOS}/exemplars", json={"exemplars": []}, headers=headers),
    ]
    for change in changes:
        assert change(READER).status_code == 403
        assert change({"api-key": "wrong"}).status_code == 401


def test_many_are_added_as_a_job_with_events(client: httpx.Client, query: bytes):
    image = base64.b64encode(query).decode()
    many = [{"id": f"many/{number}", "image": image, "label": "digit-2"} for number in range(3)]
    bad = {"id": "many/bad", "image": base64.b64encode(b"?").decode()}
    started = client.post(f"{PHOTOS}/exemplars", json={"exemplars": [*many, bad]})
    assert started.status_code == 202
    with client.stream("GET", f"{started.headers['location']}/events") as events:
        told = [json.loads(line.removeprefix("data: ")) for line in events.iter_lines() if line.startswith("data: ")]
    assert told[-1]["state"] == "done"
    done = client.get(started.headers["location"]).json()
    assert done["result"]["added"] == 3
    assert [each["query"] for each in done["result"]["skipped"]] == ["many/bad"]
    again = ended(client, client.post(f"{PHOTOS}/exemplars", json={"exemplars": many}).json())
    assert again["state"] == "failed"
    assert "the index has exemplars of these ids" in again["error"]
    assert client.get("/jobs").json()["jobs"][0]["id"] == again["id"]
    assert client.get("/jobs/none").status_code == 404


def test_an_audit_is_a_job(client: httpx.Client, index: Path):
    kinds = ["duplicates", "labels"]
    done = ended(client, client.post(f"{PHOTOS}/audit", json={"kinds": kinds}).json())
    assert done["state"] == "done", done["error"]
    with Engine.open(index, device="cpu") as engine:
        expected = engine.audit(kinds=kinds)
    assert done["result"]["findings"] == json.loads(json.dumps([each.to_json() for each in expected.findings]))
    refused = client.post(f"{PHOTOS}/audit", json={"kinds": ["duplicate"]})
    assert (refused.status_code, "did you mean 'duplicates'?" in refused.json()["detail"]) == (422, True)


def test_jobs_are_cancelled_where_they_report():
    jobs, begun = Jobs(), threading.Event()

    def work(progress):
        begun.set()
        for number in range(10_000):
            progress("waiting", number, 10_000)
            time.sleep(0.01)

    running_job, waiting_job = jobs.start("a", "photos", work), jobs.start("b", "photos", work)
    begun.wait()
    waiting_job.cancel()
    assert waiting_job.state is JobState.CANCELLED
    running_job.cancel()
    jobs.close()
    assert running_job.state is JobState.CANCELLED
    assert running_job.total == 10_000


def test_a_change_by_somebody_else_is_seen(client: httpx.Client, index: Path, tmp_path: Path):
    version = client.get(PHOTOS).json()["version"]
    with Engine.open(index, device="cpu") as engine:
        engine.add(write_photos(tmp_path / "more", count=3, start=300), id_prefix="more/")
    assert client.post(f"{PHOTOS}/refresh").json()["version"] == version + 1
    with Engine.open(index, device="cpu") as engine:
        engine.delete(where="id LIKE 'more/%'")
    while client.get(PHOTOS).json()["version"] == version + 1:
        time.sleep(0.1)
    assert client.get(PHOTOS).json()["version"] == version + 2
    manifest = (index / "index.json").read_bytes()
    (index / "index.json").write_bytes(b"{}")
    while client.get("/readyz").status_code == 200:
        time.sleep(0.1)
    assert "index.json" in client.get(PHOTOS).json()["trouble"]
    assert client.get("/livez").status_code == 200
    (index / "index.json").write_bytes(manifest)
    while client.get("/readyz").status_code != 200:
        time.sleep(0.1)


def test_metrics_count_what_was_asked(client: httpx.Client, query: bytes):
    nearest(client, query)
    told = client.get("/metrics", headers={"api-key": ""}).text
    assert 'tmm_engine_requests_total{method="POST",route="/collections/{name}/search",status="200"}' in told
    assert 'tmm_engine_step_seconds_count{mode="robust",step="embedding"}' in told
    assert 'tmm_engine_exemplars{collection="photos"}' in told
    assert "process_resident_memory_bytes" in told
