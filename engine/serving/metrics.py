"""What a server counts, for Prometheus."""

import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tmm_engine.results import FailedQuery, SearchResult
from tmm_engine.serving.collection import Collections

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class _Now(Collector):
    """What is looked up when it is asked for: queues, exemplars, the device's memory."""

    def __init__(self, collections: Collections) -> None:
        self._collections = collections

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """As Prometheus asks."""
        waiting = GaugeMetricFamily("tmm_engine_waiting", "Items that wait.", labels=["collection", "lane"])
        exemplars = GaugeMetricFamily("tmm_engine_exemplars", "Exemplars searched.", labels=["collection"])
        version = GaugeMetricFamily("tmm_engine_version", "Of the index that is searched.", labels=["collection"])
        for name, collection in self._collections.items():
            for lane in ("quick", "thorough", "changes"):
                waiting.add_metric([name, lane], len(getattr(collection, lane)))
            exemplars.add_metric([name], len(collection.shown.engine))
            version.add_metric([name], collection.shown.version)
        yield from (waiting, exemplars, version)
        if torch.cuda.is_available():
            yield GaugeMetricFamily(
                "tmm_engine_device_memory_bytes", "Taken on the device.", value=torch.cuda.memory_allocated()
            )


class Metrics:
    """Of one server.

    Args:
        collections: What it serves.
    """

    def __init__(self, collections: Collections) -> None:
        self.registry = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR, _Now(collections)):
            self.registry.register(collector)
        self._requests = Counter(
            "tmm_engine_requests", "Requests answered.", ["method", "route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "tmm_engine_request_seconds", "From request to answer.", ["route"], registry=self.registry, buckets=SECONDS
        )
        self._steps = Histogram(
            "tmm_engine_step_seconds",
            "Of a query's steps.",
            ["mode", "step"],
            registry=self.registry,
            buckets=SECONDS,
        )
        self._batches = Histogram(
            "tmm_engine_batch_queries",
            "Queries searched for together.",
            registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32, 64),
        )
        Info("tmm_engine", "Where it computes.", registry=self.registry).info({"device": _device()})

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """One request."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def searched(self, results: Sequence[SearchResult | FailedQuery]) -> None:
        """One search for one or several queries."""
        self._batches.observe(len(results))
        for mode, step, seconds in _steps(results):
            self._steps.labels(mode, step).observe(seconds)


class Counting:
    """Counts the requests of an application.

    Args:
        app: What answers.
        metrics: Where they are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an application of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.count(method, route, status, time.perf_counter() - began)


def _steps(results: Sequence[SearchResult | FailedQuery]) -> Iterator[tuple[str, str, float]]:
    for result in results:
        if isinstance(result, SearchResult):
            for step, seconds in result.timings.items():
                yield result.mode, step, seconds


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
