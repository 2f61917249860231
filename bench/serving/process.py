"""A server in a process of its own, forked from one that has only imported the libraries, so that it can be killed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from tmm_engine.index.errors import IndexStateError
from tmm_engine.serving.settings import Settings

PATIENCE = 300.0  # seconds to open the indexes
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "tmm_engine.bench.serving.process", "tmm_engine.serving.running"])


@dataclass(frozen=True, slots=True)
class Served:
    """A server that runs.

    Attributes:
        address: Of it.
        process: To kill.
    """

    address: str
    process: BaseProcess

    @property
    def alive(self) -> bool:
        """Whether it has not crashed."""
        return self.process.is_alive()


@contextmanager
def served(indexes: Mapping[str, Path], settings: Settings | None = None) -> Iterator[Served]:
    """A server of these indexes; it is stopped at the end, unless somebody has killed it.

    Raises:
        IndexStateError: it does not start.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_serve, args=(dict(indexes), settings or Settings(), sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(PATIENCE):
            raise IndexStateError(f"a server of {', '.join(map(str, indexes.values()))} did not start in {PATIENCE} s")
        yield Served(f"http://127.0.0.1:{receiver.recv()}", process)
    except EOFError:
        raise IndexStateError("the server died before it began") from None
    finally:
        process.terminate()
        process.join(60)
        if process.is_alive():
            process.kill()


def _serve(indexes: dict[str, Path], settings: Settings, sender: Connection) -> None:
    from tmm_engine.serving.running import listening, open_collections, serving

    with listening("127.0.0.1", 0, settings) as listener:
        collections = open_collections(indexes, device="cpu", limits=settings.limits)
        sender.send(listener.getsockname()[1])
        serving(collections, settings, listener)
