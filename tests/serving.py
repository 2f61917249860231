"""A real server on a free port of this machine, in a thread."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tmm_engine.serving.app import make_app
from tmm_engine.serving.running import add_built, listening, open_collections, server
from tmm_engine.serving.settings import Settings


@contextmanager
def running(
    indexes: dict[str, Path], settings: Settings | None = None, *, built: Path | None = None, **options
) -> Iterator[httpx.Client]:
    """A client of a server of these indexes, and of what was built; the server ends with the context."""
    settings = settings or Settings()
    with listening("127.0.0.1", 0, settings) as listener:
        collections = open_collections(indexes, device="cpu", limits=settings.limits, **options)
        if built is not None:
            assert not add_built(collections, built)
        own = server(make_app(collections, settings))
        thread = threading.Thread(target=own.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
                while not own.started:
                    time.sleep(0.01)
                yield client
        finally:
            own.should_exit = True
            thread.join()
