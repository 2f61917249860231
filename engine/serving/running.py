"""A server of HTTP around the application."""

import ipaddress
import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from tmm_engine.index.errors import InputError, TmmEngineError
from tmm_engine.index.store.manifest import Manifest
from tmm_engine.serving.app import make_app
from tmm_engine.serving.collection import Collection, Collections
from tmm_engine.serving.keys import WRITING
from tmm_engine.serving.requests import NAME
from tmm_engine.serving.settings import SUFFIX, Limits, Settings

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
PATIENCE = 30
"""Seconds in which requests that have begun are finished when the server is stopped."""


def named_indexes(given: Sequence[str]) -> dict[str, Path]:
    """Of PATH and NAME=PATH, paths by name; an index is called as its folder without the suffix.

    Raises:
        InputError: a name that no address can have, or one of two indexes.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = Path(text).resolve().stem, text
        if not name or "/" in name or not name.isprintable():
            raise InputError(f"expected a name without slashes for a collection, got {name!r}; say NAME={path}")
        if name in found:
            raise InputError(f"two indexes are called {name!r}: {found[name]} and {path}; say NAME={path}")
        found[name] = Path(path)
    return found


def open_collections(
    indexes: dict[str, Path], *, models: dict[str, str] | None = None, device: str = "auto", limits: Limits
) -> Collections:
    """Every index, open and ready.

    Raises:
        InputError: a model for an index that is not there.
        TmmEngineError: as `Engine.open`.
    """
    models = models or {}
    if unknown := models.keys() - indexes.keys():
        raise InputError(f"a model is given for {sorted(unknown)[0]!r}, which is none of {', '.join(indexes)}")
    return Collections(
        Collection(name, path, model=models.get(name), device=device, limits=limits) for name, path in indexes.items()
    )


def add_built(collections: Collections, folder: Path) -> list[str]:
    """Serve what clients have built, too; each as the collection that it was built like, where that is there.

    Args:
        collections: Take them.
        folder: Made where there is none.

    Returns:
        What is left out, and why, in sentences.

    Raises:
        InputError: there can be no such folder.
    """
    try:
        folder.mkdir(exist_ok=True)
        found = sorted(path for path in folder.iterdir() if NAME.fullmatch(path.stem) and path.suffix == SUFFIX)
    except OSError as error:
        raise InputError(f"{folder}: no folder for collections that are built ({error.strerror or error})") from None
    left_out = []
    for path in found:
        if path.stem in collections:
            left_out.append(f"{path} is not served: another collection is called {path.stem!r}")
            continue
        try:
            fingerprint = Manifest.read(path).fingerprint
            alike = [each for each in collections.values() if each.shown.engine.classifier.fingerprint == fingerprint]
            collections.add((alike or [*collections.values()])[0].beside(path.stem, path))
        except TmmEngineError as error:
            left_out.append(f"{path} is not served: {error}")
    return left_out


@contextmanager
def listening(host: str, port: int, settings: Settings) -> Iterator[socket.socket]:
    """A socket that clients can connect to: without keys on this machine alone.

    Args:
        host: An address or a name of this machine.
        port: 0: any that is free.
        settings: Of the server.

    Raises:
        InputError: without keys, an address that others can reach; or nobody can listen there.
    """
    if not settings.keys and not _is_loopback(host):
        raise InputError(
            f"without a key only this machine may ask: expected a loopback address such as 127.0.0.1, got {host}; "
            f"give keys (the environment's {WRITING}, or a file), or leave the host out"
        )
    try:
        found = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"nobody can listen on {host}, port {port} ({error.strerror or error}); choose others"
        ) from None
    with found:
        # asyncio leaves out sockets that do not say they are TCP's; each answer would wait 40 ms for its second half
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield found


def serving(collections: Collections, settings: Settings, listener: socket.socket) -> None:
    """Answer until the process is told to stop; what has begun is finished.

    Args:
        collections: What is served; closed at the end.
        settings: How.
        listener: Where.
    """
    if not settings.keys and not settings.hosts:
        own = listener.getsockname()[0]
        own = f"[{own}]" if ":" in own else own
        settings = replace(settings, hosts=tuple(dict.fromkeys((*LOOPBACK, own))))  # or a page elsewhere could ask
    with suppress(KeyboardInterrupt):
        server(make_app(collections, settings)).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Cancels jobs before it waits for requests: those that follow one would never end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app = self.config.app
        assert isinstance(app, FastAPI)
        app.state.serving.jobs.stop()
        await super().shutdown(sockets)


def server(app: FastAPI) -> uvicorn.Server:
    """A server of HTTP that does not run yet."""
    config = uvicorn.Config(
        app, log_level=logging.WARNING, timeout_graceful_shutdown=PATIENCE, server_header=False, access_log=False
    )
    return _Server(config)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
