"""Judges of neighbour sets: SSIM, and a model behind a real HTTP server on this machine that speaks the protocol."""

import base64
import io
import json
import socket
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.digits import IMAGES, LABELS
from tmm_engine.bench.benchmarks.oracle import estimate, judge_neighbours
from tmm_engine.bench.benchmarks.semantic import KEY
from tmm_engine.bench.judges import (
    OracleError,
    SsimJudge,
    Verdict,
    VisionJudge,
    make_pictures,
    make_question,
    read_verdict,
)
from tmm_engine.bench.records import RecordFile
from tmm_engine.index.errors import InputError
from tmm_engine.index.store.memory import MemoryStore

METHODS, K, Q, N = ["cosine", "l2", "tmm"], 3, 4, 20
QUERIES = (IMAGES[100 : 100 + Q, None] / np.float32(255)).astype(np.float32)
ROWS = {"cosine": [0, 1, 2], "l2": [3, 4, 5], "tmm": [6, 7, 8]}  # so that a picture tells its method
EXEMPLARS = MemoryStore(
    IMAGES[:N, None], {"feature": np.zeros((N, 2), np.float32)}, LABELS[:N], ids=[f"exemplar {row}" for row in range(N)]
)
KEY_TEXT = "a-key-that-nobody-may-see"


@pytest.fixture
def semantic(tmp_path: Path) -> Path:
    path = tmp_path / "semantic.jsonl"
    with RecordFile.open(path, {"benchmark": "semantic"}, KEY, ()) as records:
        for query in range(Q):
            for method, rows in ROWS.items():
                ids = [f"exemplar {row}" for row in rows]
                records.append({"query": query, "method": method, "neighbours": ids})
    return path


# --------------------------------------------------------------------------------------------- server

Reply = tuple[int, dict[str, str], str]  # status, headers, body
SOON = {"retry-after-ms": "1"}


def says(text: str | None, **changes: Any) -> Reply:
    message = {"role": "assistant", "content": text, "refusal": changes.pop("refusal", None)}
    choice = {"index": 0, "finish_reason": changes.pop("finish_reason", "stop"), "message": message}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice]} | changes
    return 200, {}, json.dumps(body)


def fails(status: int, message: str, *, code: str | None = None) -> Reply:
    return status, SOON, json.dumps({"error": {"message": message, "type": "error", "code": code}})


def verdict(alike: dict[str, int], best: list[str]) -> str:
    return json.dumps({"alike": alike, "best": best})


GOOD = verdict({"A": 3, "B": 0, "C": 1}, ["A"])


class Server(ThreadingHTTPServer):
    """Gives its replies one after the other, the last one for ever, and keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Reply | Callable[[dict[str, Any]], Reply]] = [says(GOOD)]
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        replies = self.server.replies
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        status, headers, text = reply(body) if callable(reply) else reply
        self.send_response(status)
        for name, value in ({"content-type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY_TEXT)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        thread = Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(server: Server, *replies: Reply, **options: Any) -> Verdict:
    server.replies = list(replies)
    judge = VisionJudge("judge", base_url=server.url, **({"retries": 2, "timeout": 10.0} | options))
    return judge.judge(QUERIES[0], [EXEMPLARS.images(np.array(rows)) for rows in ROWS.values()])


def run(semantic: Path, judge: Any, *, out: str = "oracle.jsonl", **options: Any) -> list[dict[str, Any]]:
    path = semantic.with_name(out)
    with RecordFile.open(path, {"benchmark": "oracle"}, KEY, ()) as records:
        judge_neighbours(semantic, QUERIES, EXEMPLARS, judge, records, **options)
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def pictures_in(body: dict[str, Any]) -> list[np.ndarray]:
    urls = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    heads, texts = zip(*(url.split(",") for url in urls), strict=True)
    assert set(heads) == {"data:image/png;base64"}
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in texts]


# -------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"I looked at {{all}} of them.\n```json\n{GOOD}\n```\nSet A is best.",
        '<think>{"alike": {"A": 9}} no</think>' + GOOD,
        verdict({"A": 0, "B": 0, "C": 0}, ["A"]) + " was the form; here it is: " + GOOD,
        '{"alike": {"A": "3", "B": "0", "C": "1"}, "best": "A"}',
    ],
)
def test_a_verdict_is_found_in_whatever_stands_around_it(server: Server, text: str):
    assert ask(server, says(text)) == Verdict((3, 0, 1), (True, False, False))


def test_several_sets_may_be_the_best(server: Server):
    told = ask(server, says(verdict({"A": 2, "B": 0, "C": 2}, ["C", "A"])))
    assert told == Verdict((2, 0, 2), (True, False, True))


@pytest.mark.parametrize(
    "text",
    [
        "",
        GOOD[:-5],
        '{"alike": [3, 0, 1], "best": ["A"]}',
        verdict({"A": 3, "B": 0}, ["A"]),
        verdict({"A": K + 1, "B": 0, "C": 1}, ["A"]),
        '{"alike": {"A": 2.5, "B": 0, "C": 1}, "best": ["A"]}',
        '{"alike": {"A": true, "B": 0, "C": 1}, "best": ["A"]}',
        verdict({"A": 3, "B": 0, "C": 1}, ["D"]),
        verdict({"A": 3, "B": 0, "C": 1}, []),
        '{"alike": {"A": 3, "B": 0, "C": 1}, "best": null}',
        '{"a":' * 5_000,
    ],
)
def test_nonsense_is_no_verdict(text: str):
    told = read_verdict(text, sets=3, k=K)
    assert told.alike is told.preferred is None
    assert told.reason.startswith("no verdict in the answer: ")
    assert len(told.reason) <= 200


@given(st.text())
def test_no_text_breaks_the_reading(text: str):
    assert read_verdict(text + GOOD + text.replace("{", ""), sets=3, k=K).alike == (3, 0, 1)
    read_verdict(text, sets=3, k=K)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (says(None, refusal="I cannot judge digits."), "refused: I cannot judge digits."),
        (says(None, finish_reason="content_filter"), "refused: content filter"),
        (fails(400, "filtered", code="content_filter"), "refused: "),
        (says(None), "no verdict in the answer: ''"),
        (says("", choices=[]), "the answer holds no message"),
        (says("", choices=[{"index": 0}]), "the answer holds no message"),
        ((200, {}, '{"error": "overloaded"}'), "the answer holds no message"),
        ((200, {}, '{"choices": [{'), "no answer: "),
    ],
)
def test_refusals_and_odd_answers_are_no_verdict(server: Server, reply: Reply, reason: str):
    told = ask(server, reply)
    assert told.alike is told.preferred is None
    assert told.reason.startswith(reason)


# ------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_failure_that_passes_is_asked_again(server: Server, status: int):
    assert ask(server, fails(status, "later"), fails(status, "later"), says(GOOD)).alike == (3, 0, 1)
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [429, 500])
def test_a_failure_that_stays_is_no_verdict_after_all_attempts(server: Server, status: int):
    told = ask(server, fails(status, "overloaded"))
    assert told.alike is None
    assert str(status) in told.reason
    assert "overloaded" in told.reason
    assert len(server.requests) == 3


def test_no_connection_is_no_verdict(server: Server):
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        judge = VisionJudge("judge", base_url=f"http://127.0.0.1:{bound.getsockname()[1]}/v1", retries=0)
        told = judge.judge(QUERIES[0], [EXEMPLARS.images(np.arange(K))])
    assert told.alike is None
    assert "refused" in told.reason


@pytest.mark.parametrize(
    ("reply", "advice"),
    [
        (fails(401, f"Incorrect key: {KEY_TEXT}"), "check OPENAI_API_KEY"),
        (fails(403, "not yours"), "not yours.*what the account may use"),
        (fails(404, "no such model"), r"no such model.*--judge-model \(judge\), --base-url \(http://127"),
        (fails(400, "temperature must be 1"), "temperature must be 1"),
        (fails(429, "no credit", code="insufficient_quota"), "no credit"),
        ((200, {"content-type": "text/html"}, "<html>hello"), "'<html>hello'; check --base-url"),
    ],
)
def test_what_will_not_pass_stops_the_run_and_keeps_what_was_judged(
    semantic: Path, server: Server, reply: Reply, advice: str
):
    server.replies = [says(GOOD), reply]
    with pytest.raises(OracleError, match=advice) as raised:
        run(semantic, VisionJudge("judge", base_url=server.url, retries=0))
    assert KEY_TEXT not in str(raised.value)
    assert len(server.requests) == 2
    server.replies = [says(GOOD)]
    records = run(semantic, VisionJudge("judge", base_url=server.url, retries=0))
    assert len(server.requests) == 2 + Q - 1
    assert [record["query"] for record in records] == [query for query in range(Q) for _ in METHODS]


def test_a_key_and_the_extra_are_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="expected a key in OPENAI_API_KEY, got none"):
        VisionJudge("judge")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'tmm-engine\[oracle\]'"):
        VisionJudge("judge")


# ------------------------------------------------------------------------------------ what is asked


def test_the_request_is_a_blind_question_with_every_picture(server: Server):
    ask(server, says(GOOD))
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == f"Bearer {KEY_TEXT}"
    assert (body["model"], body["temperature"]) == ("judge", 0)
    texts = [part["text"] for part in body["messages"][0]["content"] if part["type"] == "text"]
    assert texts == [make_question(3, K), "Query:", "Set A:", "Set B:", "Set C:"]
    assert not [method for method in METHODS if method in " ".join(texts)]
    query, *sets = pictures_in(body)
    assert query.shape == (128, 128, 3)
    assert {picture.shape for picture in sets} == {(128, 3 * 128 + 2 * 8, 3)}


def test_a_reasoning_model_is_given_no_temperature(server: Server):
    ask(server, says(GOOD), temperature=None)
    assert "temperature" not in server.requests[0][2]


def test_the_question_shows_the_form_of_the_answer_it_wants():
    question = make_question(3, K)
    assert read_verdict(question, sets=3, k=K) == Verdict((0, 0, 0), (True, False, False))


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 8, 8), (128, 128)), ((3, 32, 16), (64, 128)), ((3, 512, 512), (256, 256))]
)
def test_pictures_are_large_enough_to_see_and_no_larger_than_needed(shape: tuple[int, ...], size: tuple[int, int]):
    query = np.random.default_rng(0).random(shape).astype(np.float32)
    neighbours = np.zeros((7, *shape), np.uint8)
    neighbours[6] = 200
    picture, sheet = make_pictures(query, [neighbours])
    assert picture.size == size
    width, height = size
    assert sheet.size == (5 * (width + 8) - 8, 2 * (height + 8) - 8)
    assert sheet.getpixel((width + 8 + width // 2, height + 8 + height // 2)) == (200, 200, 200)  # the seventh
    assert sheet.getpixel((4 * (width + 8), height + 20)) == (255, 255, 255)  # no tenth


# -------------------------------------------------------------------------------------------- records


def by_what_it_sees(body: dict[str, Any]) -> Reply:
    """Judges by what it sees alone: the method with the rows 6, 7, 8 is the best, 3, 4, 5 the second."""
    known = {method: make_pictures(QUERIES[0], [EXEMPLARS.images(np.array(rows))])[1] for method, rows in ROWS.items()}
    alike, best = {}, None
    for letter, picture in zip("ABC", pictures_in(body)[1:], strict=True):
        method = next(name for name, sheet in known.items() if np.array_equal(np.asarray(sheet), picture))
        alike[letter] = METHODS.index(method) + 1
        best = letter if method == "tmm" else best
    return says(verdict(alike, [best]))


def test_verdicts_reach_the_methods_whatever_the_order(semantic: Path, server: Server):
    server.replies = [by_what_it_sees]
    records = run(semantic, VisionJudge("judge", base_url=server.url), seed=3)
    assert len(records) == Q * len(METHODS)
    for record in records:
        assert record["alike"] == METHODS.index(record["method"]) + 1
        assert record["preferred"] is (record["method"] == "tmm")
        assert (record["k"], record["reason"]) == (K, None)
        assert sorted(record["order"]) == METHODS
    assert len({tuple(record["order"]) for record in records}) > 1


def test_the_order_depends_on_seed_and_query_only(semantic: Path):
    orders = [
        {record["query"]: record["order"] for record in run(semantic, SsimJudge(), out=f"{number}.jsonl", seed=seed)}
        for number, seed in enumerate((0, 0, 1, 2))
    ]
    assert orders[0] == orders[1]
    assert orders[0] not in orders[2:]


def test_no_verdict_is_recorded_with_its_reason(semantic: Path, server: Server):
    server.replies = [says("no idea"), says(GOOD)]
    records = run(semantic, VisionJudge("judge", base_url=server.url))
    for record in records[: len(METHODS)]:
        assert record["alike"] is record["preferred"] is None
        assert record["reason"] == "no verdict in the answer: 'no idea'"
    assert all(record["alike"] is not None for record in records[len(METHODS) :])


def test_a_finished_run_asks_nothing(semantic: Path, server: Server):
    judge, steps = VisionJudge("judge", base_url=server.url), []
    first = run(semantic, judge)
    assert len(server.requests) == Q
    assert run(semantic, judge, progress=lambda *step: steps.append(step)) == first
    assert len(server.requests) == Q
    assert steps == [("judging", done, Q) for done in range(1, Q + 1)]


# ------------------------------------------------------------------------------------ SSIM, estimate


def test_ssim_prefers_the_set_that_looks_like_the_query():
    query = QUERIES[0]
    same = np.repeat((query[None] * 255).round().astype(np.uint8), K, axis=0)
    told = SsimJudge().judge(query, [EXEMPLARS.images(np.arange(K)), same, 255 - same])
    assert told.preferred == (False, True, False)
    assert told.alike[1] == K
    assert told.alike[2] == 0
    rotated = [EXEMPLARS.images(np.roll(np.arange(10), by)) for by in range(10)]
    assert all(SsimJudge().judge(query, rotated).preferred)  # their means differ in the last bit
    assert SsimJudge().judge(query, [same, same]) == Verdict((K, K), (True, True))


def test_the_estimate_counts_what_would_be_sent(semantic: Path, server: Server):
    judged = estimate(semantic, QUERIES, EXEMPLARS, price_per_million=2.5)
    run(semantic, VisionJudge("judge", base_url=server.url))
    bodies = [body for _, _, body in server.requests]
    assert judged.requests == len(bodies)
    assert judged.pictures == sum(len(pictures_in(body)) for body in bodies)
    tokens = len(make_question(3, K)) // 4 + 4 * (85 + 170)  # every picture is smaller than a tile
    assert judged.input_tokens == Q * tokens
    assert judged.price == pytest.approx(Q * tokens * 2.5e-6)


@pytest.mark.parametrize("queries", [QUERIES[:2], QUERIES[:0]])
def test_other_queries_than_those_measured_are_refused(semantic: Path, queries: np.ndarray):
    with pytest.raises(InputError, match="query 3 and there are only"):
        estimate(semantic, queries, EXEMPLARS, price_per_million=1.0)
