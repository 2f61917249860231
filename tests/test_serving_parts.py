"""Parts of the server: lanes, keys, where it listens, how it stops, and a disk that is full."""

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch
from click.testing import CliRunner
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.digits import make_classifier, write_photos, write_queries
from tests.serving import running
from tmm_engine import Engine, build_index
from tmm_engine.bench.reliability.surroundings import small_disk
from tmm_engine.cli.main import main
from tmm_engine.index.errors import IndexStateError, InputError
from tmm_engine.serving.jobs import WAITING, Jobs
from tmm_engine.serving.keys import READING, WRITING, Keys, Right
from tmm_engine.serving.lane import BusyError, Lane, in_own_thread
from tmm_engine.serving.problems import BodyLimit, OwnOrigin, status_of
from tmm_engine.serving.running import LOOPBACK, listening, named_indexes
from tmm_engine.serving.settings import Settings


def held(lane: Lane) -> threading.Event:
    """Let a lane be busy until the event is set."""
    begun, go_on = threading.Event(), threading.Event()

    def wait(items: list[int]) -> list[int]:
        begun.set()
        go_on.wait()
        return items

    lane.ask([0], wait)
    begun.wait()
    return go_on


def test_what_waits_and_is_alike_is_worked_off_together_and_in_order():
    lane, seen = Lane("test", limit=10, together=3), []

    def work(items: list[int]) -> list[int]:
        seen.append(items)
        return [10 * item for item in items]

    go_on = held(lane)
    asked = [lane.ask([item], work, kind=item % 2) for item in range(1, 9)] + [lane.ask([9, 10], work)]
    assert len(lane) == 10
    go_on.set()
    assert [each.result() for each in asked] == [[10 * item] for item in range(1, 9)] + [[90, 100]]
    assert seen == [[1, 3, 5], [2, 4, 6], [7], [8], [9, 10]]
    lane.close()


def test_where_several_asked_as_many_are_waited_for_and_not_for_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tmm_engine.serving.lane.MOMENT", 1.0)
    monkeypatch.setattr("tmm_engine.serving.lane.SHARE", 1e9)
    lane, seen = Lane("test", limit=10, together=4), []

    def work(items: list[int]) -> list[int]:
        seen.append(items)
        return items

    go_on = held(lane)
    first = [lane.ask([item], work, kind=0) for item in (1, 2)]
    go_on.set()
    assert [each.result() for each in first] == [[1], [2]]
    one = lane.ask([3], work, kind=0)
    time.sleep(0.05)
    other = lane.ask([4], work, kind=0)
    assert (one.result(), other.result()) == ([3], [4])
    assert lane.ask([5], work, kind=0).result() == [5]  # nobody comes
    assert seen == [[1, 2], [3, 4], [5]]
    lane.close()


def test_after_the_list_of_one_request_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tmm_engine.serving.lane.MOMENT", 3600.0)
    monkeypatch.setattr("tmm_engine.serving.lane.SHARE", 1e9)
    lane = Lane("test", limit=10, together=4)
    for asked in ([1, 2, 3], [4]):
        assert lane.ask(asked, list, kind=0).result(timeout=60) == asked
    lane.close()


def test_a_lane_without_work_has_no_thread_and_gets_one_again():
    lane = Lane("soon idle", limit=10, together=1, idle=0.05)
    for item in range(2):
        assert lane.ask([item], list).result() == [item]
        deadline = time.monotonic() + 30
        while any(thread.name == "soon idle" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    lane.close()


def test_a_full_or_closed_lane_refuses_and_says_when_to_come_again():
    lane = Lane("test", limit=2, together=1)
    go_on = held(lane)
    waiting = [lane.ask([1], list), lane.ask([2], list)]
    with pytest.raises(BusyError, match="ask again in 1 s"):
        lane.ask([3], list)
    cancelled = waiting[0].cancel()
    go_on.set()
    lane.close()
    assert (cancelled, waiting[1].result()) == (True, [2])
    with pytest.raises(BusyError):
        lane.ask([4], list)


def test_an_error_is_that_of_what_was_asked():
    lane = Lane("test", limit=10, together=4)
    with pytest.raises(ZeroDivisionError):
        lane.ask([1, 0], lambda items: [1 // item for item in items]).result()
    assert lane.ask([2], list).result() == [2]
    lane.close()


def test_keys_are_those_of_the_file_and_the_environment(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text("# ours\nread-only for-reading\n\nread-write for-writing\n")
    keys = Keys.given(file, {WRITING: "of-the-environment", READING: ""})
    rights = [
        keys.right_of(key) for key in ("for-reading", "for-writing", "of-the-environment", "for-readinG", "", None)
    ]
    assert rights == [Right.READ, Right.WRITE, Right.WRITE, None, None, None]
    assert "for-reading" not in repr(keys)
    assert Keys().right_of(None) is Right.WRITE
    for text in ("read-only short", "both for-reading", "for-reading", "read-only two words"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"keys|expected a key"):
            Keys.given(file, {})
    with pytest.raises(InputError, match="expected a file of keys"):
        Keys.given(tmp_path / "none", {})


def test_without_keys_only_this_machine_is_listened_to():
    with (
        pytest.raises(InputError, match="without a key only this machine may ask"),
        listening("0.0.0.0", 0, Settings()),
    ):
        pass
    with listening("127.0.0.1", 0, Settings()) as found:
        with pytest.raises(InputError, match="nobody can listen on"), listening(*found.getsockname(), Settings()):
            pass
        refused = CliRunner().invoke(main, ["serve", "none.idx", "--host", "0.0.0.0"])
        assert (refused.exit_code, "without a key" in refused.stderr) == (1, True)


def test_what_is_sent_in_two_parts_does_not_wait_for_an_answer_to_the_first():
    with listening("127.0.0.1", 0, Settings()) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_indexes_are_called_as_their_folders_or_as_said():
    assert named_indexes(["a/photos.idx", "cats=b/photos.idx"]) == {
        "photos": Path("a/photos.idx"),
        "cats": Path("b/photos.idx"),
    }
    for given in (["a/x.idx", "b/x.idx"], ["=x"], ["a/b=x"]):
        with pytest.raises(InputError):
            named_indexes(given)


def test_a_stopped_server_finishes_what_it_has_begun(tmp_path: Path):
    write_photos(tmp_path / "photos", count=20)
    [query] = write_queries(tmp_path / "queries", count=1).iterdir()
    build_index(tmp_path / "photos", tmp_path / "photos.idx", make_classifier(), views=1)
    answers: list[httpx.Response] = []
    arrived = threading.Event()

    def image() -> Iterator[bytes]:
        yield query.read_bytes()
        arrived.set()

    def ask(address: str) -> None:
        address += "?settings=trigger.steps=60&settings=head.min_steps=60"
        answers.append(httpx.post(address, content=image(), timeout=60, headers={"content-type": "image/png"}))

    with running({"photos": tmp_path / "photos.idx"}) as client:
        asking = threading.Thread(target=ask, args=(f"{client.base_url}/collections/photos/search",))
        asking.start()
        arrived.wait()
    asking.join()
    assert [each.status_code for each in answers] == [200], answers


def test_a_full_disk_while_adding_is_said_and_loses_nothing(tmp_path: Path):
    [query] = write_queries(tmp_path / "queries", count=1).iterdir()
    write_photos(tmp_path / "photos", count=12)
    with small_disk(tmp_path / "disk", mebibytes=64) as disk:
        if disk is None:
            pytest.skip("no small disk can be mounted here")
        index = disk / "photos.idx"
        build_index(tmp_path / "photos", index, make_classifier(), views=1)
        with running({"photos": index}) as client:
            before = client.get("/collections/photos").json()["exemplars"]
            with (disk / "filling").open("wb", buffering=0) as filling, pytest.raises(OSError):
                while True:
                    filling.write(bytes(4096))
            response = client.put(
                "/collections/photos/exemplars/new", content=query.read_bytes(), headers={"content-type": "image/png"}
            )
            assert response.status_code == 507, response.text
            assert client.post("/collections/photos/search", files={"image": query.read_bytes()}).status_code == 200
        (disk / "filling").unlink()
        with Engine.open(index, device="cpu", verify=True) as engine:
            assert len(engine) == before


def test_the_status_of_a_full_disk_is_told_from_damage():
    full = IndexStateError("x cannot be written")
    full.__cause__ = OSError(28, "No space left on device")
    assert [status_of(each) for each in (full, IndexStateError("damaged"), InputError("wrong"))] == [507, 500, 422]


@pytest.mark.parametrize(
    ("method", "origin", "status"),
    [
        ("POST", "http://elsewhere.example", 403),
        ("DELETE", "null", 403),
        ("POST", "http://[", 403),
        ("POST", "http://127.0.0.1:8000", 200),
        ("POST", None, 200),
        ("GET", "http://elsewhere.example", 200),
    ],
)
def test_a_page_of_another_origin_may_change_nothing(method: str, origin: str | None, status: int):
    app = OwnOrigin(PlainTextResponse("yes"), LOOPBACK)
    assert answered(app, method, "http://127.0.0.1:8000", origin=origin).status_code == status


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "127.0.0.1", "LOCALHOST:8000", "[::1]:8000", "[::1]"])
def test_a_request_to_this_server_is_answered_whatever_the_port(host: str):
    assert answered(OwnOrigin(PlainTextResponse("yes"), LOOPBACK), "GET", f"http://{host}").text == "yes"


@pytest.mark.parametrize("host", ["elsewhere.example", "127.0.0.1.elsewhere.example:8000", "[::2]:8000"])
def test_a_request_to_another_name_is_a_problem(host: str):
    refused = answered(OwnOrigin(PlainTextResponse("yes"), LOOPBACK), "GET", f"http://{host}")
    assert (refused.status_code, refused.headers["content-type"]) == (400, "application/problem+json")
    assert "expected a request to localhost or 127.0.0.1 or [::1], got one to" in refused.json()["detail"]


def answered(app: ASGIApp, method: str, address: str, *, origin: str | None = None) -> httpx.Response:
    """What an application answers without a server."""

    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=address) as client:
            return await client.request(method, "/", headers={"origin": origin} if origin else {})

    return asyncio.run(asked())


@pytest.mark.parametrize("stops", [True, False])
def test_a_body_that_does_not_come_on_is_not_waited_for(stops: bool):
    """One that stops after its first part, and one that comes drop by drop."""
    drops = itertools.count()

    async def receive() -> Message:
        await asyncio.sleep(60 if stops and next(drops) else 0.02)
        return {"type": "http.request", "body": b"drop", "more_body": True}

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass

    async def send(message: Message) -> None:
        pass

    limited = BodyLimit(read, 1 << 20, patience=0.05)
    with pytest.raises(HTTPException, match="expected a body that comes on, got") as refused:
        asyncio.run(limited({"type": "http", "headers": []}, receive, send))
    assert refused.value.status_code == 408


def test_whoever_waits_for_an_answer_is_not_hurried():
    messages = iter([{"type": "http.request", "body": b"all", "more_body": False}, {"type": "http.disconnect"}])

    async def receive() -> Message:
        message = next(messages)
        await asyncio.sleep(0.2 if message["type"] == "http.disconnect" else 0.0)
        return message

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        assert [(await receive())["type"] for _ in range(2)] == ["http.request", "http.disconnect"]

    async def send(message: Message) -> None:
        pass

    asyncio.run(BodyLimit(read, 10, patience=0.05)({"type": "http", "headers": []}, receive, send))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of threads")
def test_what_computes_aside_leaves_no_thread_of_openmp_behind():
    """A second living thread that has computed makes every search a quarter slower (`Lane`)."""

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    compute = partial(torch.mm, torch.ones(600, 600), torch.ones(600, 600))
    compute()
    before = threads()
    in_own_thread(compute)
    lane = Lane("test", limit=10, together=1, idle=0.01)
    lane.ask([1], lambda items: [compute() for _ in items]).result()
    deadline = time.monotonic() + 10
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() <= before


def test_a_panic_below_python_ends_neither_a_lane_nor_a_job():
    class PanicError(BaseException):
        pass

    def panics(_: object) -> list[int]:
        raise PanicError("index out of bounds")

    lane = Lane("lane", limit=4, together=1)
    with pytest.raises(PanicError):
        lane.ask([1], panics).result()
    assert lane.ask([1], lambda items: items).result() == [1]
    lane.close()
    jobs = Jobs()
    job = jobs.start("audit", "photos", panics)
    jobs.start("audit", "photos", lambda _: None)._future.result()
    assert (job.state, job.error) == ("failed", "this should not happen: PanicError: index out of bounds")
    jobs.close()


def test_only_so_many_jobs_may_wait():
    jobs, go_on = Jobs(), threading.Event()
    for _ in range(WAITING):
        jobs.start("audit", "photos", lambda _: go_on.wait())
    with pytest.raises(BusyError):
        jobs.start("audit", "photos", lambda _: None)
    go_on.set()
    jobs.close()
