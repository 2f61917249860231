"""What HTTP costs on top of `Engine.search`, and what a server does when it is asked for more than it can."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tmm_engine.bench.serving.load import BUSY, HEADERS, OK, PATIENCE, at_rate, one_by_one, seconds_of, several_clients
from tmm_engine.bench.serving.process import served
from tmm_engine.engine import Engine
from tmm_engine.index.progress import Progress
from tmm_engine.serving.settings import Limits, Settings
from tmm_engine.views.showing import as_picture, png_bytes

LIST = 16


@dataclass(slots=True)
class Speed:
    """Figures, and what they were made of.

    Attributes:
        figures: By key.
        records: Raw.
    """

    figures: dict[str, float] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)


def measure_speed(
    index: Path, *, pairs: int, rounds: int, seconds: float, overload: float, queue: int, progress: Progress
) -> Speed:
    """Everything on one index, over loopback, beside an engine in this process.

    Args:
        index: Its folder; some of its exemplars are the queries.
        pairs: Requests that are each followed by the same search without HTTP.
        rounds: Of clients and lists in turn.
        seconds: Of a round's half.
        overload: Seconds at twice what the server can.
        queue: Images that may wait then.
        progress: Told of what is done.
    """
    found = Speed()
    with Engine.open(index, device="cpu") as engine:
        images = _queries(engine)
        with served({"index": index}) as server:
            address = f"{server.address}/collections/index/search"
            _overhead(engine, address, images, found, pairs=pairs, progress=progress)
        with served({"index": index}) as alone, served({"index": index}, Settings(batched=True)) as batched:
            addresses = {"http": alone.address, "batched": batched.address}
            _throughput(engine, addresses, images, found, rounds=rounds, seconds=seconds, progress=progress)
    with served({"index": index}, Settings(limits=Limits(waiting=queue, batch=queue))) as server:
        address = f"{server.address}/collections/index/search"
        _overload(address, images, found, pairs=pairs, overload=overload, seconds=seconds, progress=progress)
    return found


def _queries(engine: Engine) -> list[bytes]:
    rows = np.sort(np.random.default_rng(0).choice(len(engine), min(256, len(engine)), replace=False))
    return [png_bytes(as_picture(image)) for image in engine.store.images(rows)]


def _overhead(
    engine: Engine, address: str, images: Sequence[bytes], found: Speed, *, pairs: int, progress: Progress
) -> None:
    """Requests and searches in turn, so that a busy machine slows both."""
    http, direct = [], []
    with httpx.Client(timeout=PATIENCE) as client:
        for number in range(-5, pairs):  # the first few are not counted
            image = images[number % len(images)]
            began = time.perf_counter()
            client.post(address, content=image, headers=HEADERS).raise_for_status()
            between = time.perf_counter()
            engine.search(image)
            if number >= 0:
                http.append(between - began)
                direct.append(time.perf_counter() - between)
            progress("one by one", max(number, 0) + 1, pairs)
    found.records += [
        {"part": "overhead", "http": round(one, 5), "direct": round(other, 5)}
        for one, other in zip(http, direct, strict=True)
    ]
    found.figures |= {
        "overhead_ms": 1e3 * float(np.median(http) - np.median(direct)),
        "overhead_of_fastest_quarter_ms": 1e3 * float(np.quantile(http, 0.25) - np.quantile(direct, 0.25)),
        "http_p50_ms": 1e3 * float(np.median(http)),
        "direct_p50_ms": 1e3 * float(np.median(direct)),
    }


def _throughput(
    engine: Engine,
    addresses: Mapping[str, str],
    images: Sequence[bytes],
    found: Speed,
    *,
    rounds: int,
    seconds: float,
    progress: Progress,
) -> None:
    """Clients and lists in turn: with each query alone, and with many that pass the network together."""
    rates: dict[str, list[float]] = {"http": [], "batched": [], "lists": [], "alone": []}
    for number in range(rounds):
        for name, address in addresses.items():
            answers = several_clients(f"{address}/collections/index/search", images, clients=LIST, seconds=seconds)
            accepted = [each for each in answers if each.status == OK]
            rates[name].append(len(accepted) / max(each.at + each.seconds for each in accepted))
        rates["lists"].append(_of_lists(engine, images, seconds, alone=False))
        rates["alone"].append(_of_lists(engine, images, seconds, alone=True))
        progress("16 at once", number + 1, rounds)
    for number, each in enumerate(zip(*rates.values(), strict=True)):
        named = zip(rates, each, strict=True)
        found.records.append({"part": "throughput", "round": number} | {name: round(rate, 3) for name, rate in named})
    median = {name: float(np.median(each)) for name, each in rates.items()}
    found.figures |= {
        "throughput_ratio": median["batched"] / median["lists"],
        "throughput_ratio_alone": median["http"] / median["alone"],
        "throughput_ratio_of_default": median["http"] / median["lists"],
        "http_per_second": median["http"],
        "batched_per_second": median["batched"],
    }


def _of_lists(engine: Engine, images: Sequence[bytes], seconds: float, *, alone: bool) -> float:
    """Queries a second of lists of 16."""
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        engine.search([images[(done + place) % len(images)] for place in range(LIST)], alone=alone)
        done += LIST
    return done / (time.perf_counter() - began)


def _overload(
    address: str,
    images: Sequence[bytes],
    found: Speed,
    *,
    pairs: int,
    overload: float,
    seconds: float,
    progress: Progress,
) -> None:
    one_by_one(address, images, 5)
    unloaded = one_by_one(address, images, pairs)
    progress("overload", 1, 3)
    closed = [each for each in several_clients(address, images, clients=LIST, seconds=seconds) if each.status == OK]
    sustained = len(closed) / max(each.at + each.seconds for each in closed)
    progress("overload", 2, 3)
    answers = at_rate(address, images, rate=2 * sustained, seconds=overload)
    progress("overload", 3, 3)
    for part, some in (("unloaded", unloaded), ("overload", answers)):
        found.records += [{"part": part} | each.to_json() for each in some]
    found.figures |= {
        "overload_errors": sum(each.status not in (OK, BUSY) for each in answers),
        "overload_p99_ratio": seconds_of(answers, 0.99) / seconds_of(unloaded, 0.99),
        "overload_p50_ratio": seconds_of(answers, 0.5) / seconds_of(unloaded, 0.5),
        "overload_requests": len(answers),
        "overload_accepted": sum(each.status == OK for each in answers),
        "unloaded_p99_ms": 1e3 * seconds_of(unloaded, 0.99),
        "sustained_per_second": sustained,
    }
