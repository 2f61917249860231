"""Servers killed under load and while exemplars come and go: what they have answered for is there afterwards."""

import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tmm_engine.bench.serving.process import Served, served
from tmm_engine.engine import Engine
from tmm_engine.index.errors import TmmEngineError
from tmm_engine.index.progress import Progress

SECONDS = (0.0, 1.5)  # from the first change that was answered for to the kill
PATIENCE = 60.0


@dataclass(slots=True)
class Told:
    """What a server has answered for.

    Attributes:
        there: Ids of exemplars that were added.
        gone: Of those that were removed.
        asked: Of those that were asked to be added, or removed, last: they may be there or not.
        searches: Answered meanwhile.
    """

    there: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    searches: int = 0


def measure_kills(
    base: Path, folder: Path, image: bytes, *, kills: int, seed: int, progress: Progress
) -> list[dict[str, Any]]:
    """A record for every kill; ``lost`` counts changes that were answered for and are not there.

    Args:
        base: An index, which is copied each time.
        folder: For the copies.
        image: That is added and searched for.
        kills: How many.
        seed: Of the moments.
        progress: Told of each.
    """
    generator, records = random.Random(seed), []
    for number in range(kills):
        index = folder / "killed.idx"
        shutil.copytree(base, index)
        with Engine.open(base, device="cpu") as engine:
            before = {str(id_) for id_ in engine.store.ids}
        seconds = generator.uniform(*SECONDS)
        with served({"killed": index}) as server:
            told = _work_until_killed(server, image, seconds)
        records.append({"part": "kill", "number": number, "seconds": round(seconds, 3)} | _judged(index, before, told))
        shutil.rmtree(index)
        progress("killing servers", number + 1, kills)
    return records


def _work_until_killed(server: Served, image: bytes, seconds: float) -> Told:
    """Two clients change exemplars, two search, until the server is killed."""
    told, over = Told(), threading.Event()
    with ThreadPoolExecutor(4) as pool:
        for name in ("a", "b"):
            pool.submit(_change, server, image, name, told, over)
            pool.submit(_search, server, image, told, over)
        began = time.monotonic()
        while not told.there and time.monotonic() - began < PATIENCE:
            time.sleep(0.01)
        time.sleep(seconds)
        server.process.kill()
        server.process.join()
        over.set()
    return told


def _change(server: Served, image: bytes, name: str, told: Told, over: threading.Event) -> None:
    address, headers = f"{server.address}/collections/killed/exemplars", {"content-type": "image/png"}
    with httpx.Client(timeout=10) as client:
        number = 0
        while not over.is_set():
            id_, number = f"{name}/{number}", number + 1
            told.asked.add(id_)
            try:
                if client.put(f"{address}/{id_}", content=image, headers=headers).status_code == 201:
                    told.there.add(id_)
                    told.asked.discard(id_)
                if number % 3 == 0:
                    told.asked.add(id_)
                    if client.delete(f"{address}/{id_}").status_code == 200:
                        told.gone.add(id_)
                        told.asked.discard(id_)
            except httpx.HTTPError:
                return


def _search(server: Served, image: bytes, told: Told, over: threading.Event) -> None:
    address = f"{server.address}/collections/killed/search"
    with httpx.Client(timeout=10) as client:
        while not over.is_set():
            try:
                told.searches += client.post(address, files={"image": image}).is_success
            except httpx.HTTPError:
                return


def _judged(index: Path, before: set[str], told: Told) -> dict[str, Any]:
    expected = (before | told.there) - told.gone - told.asked
    try:
        with Engine.open(index, device="cpu", verify=True) as engine:
            found = {str(id_) for id_ in engine.store.ids}
            engine.search(engine.exemplar(sorted(found)[0]), k=3)
        lost = len(expected - found) + len(found - expected - told.asked)
        error = None
    except TmmEngineError as problem:
        lost, error = len(told.there) + len(told.gone) + 1, str(problem)
    counted = {"added": len(told.there), "removed": len(told.gone), "searches": told.searches}
    return counted | {"lost": lost, "error": error}
