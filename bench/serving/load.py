"""Requests to a server: one after the other, from several clients at once, or as many a second whatever it answers."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import numpy as np

OK, BUSY, NOTHING = 200, 503, 0
HEADERS = {"content-type": "image/png"}
PATIENCE = 60.0


@dataclass(frozen=True, slots=True)
class Answered:
    """One request.

    Attributes:
        at: Seconds since the beginning.
        seconds: Until the answer.
        status: Of HTTP; 0: there was no answer.
    """

    at: float
    seconds: float
    status: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {name: round(value, 5) for name, value in asdict(self).items()}


def seconds_of(answers: Sequence[Answered], quantile: float) -> float:
    """A quantile of the seconds of requests that were accepted."""
    return float(np.quantile([each.seconds for each in answers if each.status == OK], quantile))


def one_by_one(address: str, images: Sequence[bytes], count: int) -> list[Answered]:
    """Requests of one client."""
    return asyncio.run(_closed(address, images, clients=1, seconds=np.inf, count=count))


def several_clients(address: str, images: Sequence[bytes], *, clients: int, seconds: float) -> list[Answered]:
    """Requests of clients that each wait for their answer; one that is told to come again later does."""
    return asyncio.run(_closed(address, images, clients=clients, seconds=seconds, count=None))


def at_rate(address: str, images: Sequence[bytes], *, rate: float, seconds: float) -> list[Answered]:
    """So many requests a second, whatever becomes of those before."""
    return asyncio.run(_open(address, images, rate, seconds))


async def _closed(
    address: str, images: Sequence[bytes], *, clients: int, seconds: float, count: int | None
) -> list[Answered]:
    found: list[Answered] = []

    async def client(http: httpx.AsyncClient, number: int, began: float) -> None:
        asked = number
        while time.perf_counter() - began < seconds and (count is None or len(found) < count):
            answer, wait = await _ask(http, address, images[asked % len(images)], began)
            found.append(answer)
            asked += clients
            if answer.status == BUSY:
                await asyncio.sleep(wait)

    async with _http() as http:
        origin = time.perf_counter()
        await asyncio.gather(*(client(http, number, origin) for number in range(clients)))
    return found


async def _open(address: str, images: Sequence[bytes], rate: float, seconds: float) -> list[Answered]:
    async def later(http: httpx.AsyncClient, number: int, began: float) -> Answered:
        await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        answer, _ = await _ask(http, address, images[number % len(images)], began)
        return answer

    async with _http() as http:
        origin = time.perf_counter()
        return [*await asyncio.gather(*(later(http, number, origin) for number in range(round(rate * seconds))))]


def _http() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=None))


async def _ask(http: httpx.AsyncClient, address: str, image: bytes, origin: float) -> tuple[Answered, float]:
    began = time.perf_counter()
    try:
        response = await http.post(address, content=image, headers=HEADERS)
        status, wait = response.status_code, float(response.headers.get("retry-after", "0"))
    except httpx.HTTPError:
        status, wait = NOTHING, 0.0
    return Answered(began - origin, time.perf_counter() - began, status), wait
