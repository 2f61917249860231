"""Connecting to a Ray cluster, in bounded time, and what there is to work with."""

import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

from tmm_engine.index.errors import InputError

LOCAL = "local"
AUTO = "auto"
CONNECT_SECONDS = 5.0  # that a port may take to answer
HEALTH_SECONDS = 30.0  # that Ray may take to say that it is Ray: it gives up after minutes itself, and ends the process


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions:
    """Where a build or a search runs.

    Attributes:
        address: ``HOST:PORT`` of a Ray cluster that this machine is part of; ``auto``: the one that runs on this
            machine, else a new one on it alone; ``local``: always a new one.
        cpus: CPUs for each worker, 1 or more.
        device: ``auto``: one worker for each GPU where the cluster has any; ``cpu``: workers on CPUs alone.
    """

    address: str = AUTO
    cpus: int = 1
    device: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.cpus, bool) or not isinstance(self.cpus, int) or self.cpus < 1:
            raise InputError(f"cpus: expected a whole number of at least 1, got {self.cpus!r}")
        for name in ("address", "device"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name}: expected a text, got {getattr(self, name)!r}")
        if self.address not in (AUTO, LOCAL):
            _host_and_port(self.address)

    @classmethod
    def of(cls, ray: "RayOptions | str | bool | None") -> "RayOptions | None":
        """From what an argument `ray` may be: options, an address, True for ``auto``, False or None for no Ray."""
        if ray is None or ray is False:
            return None
        if isinstance(ray, RayOptions):
            return ray
        return cls(address=AUTO if ray is True else ray)


@dataclass(frozen=True, slots=True)
class Connection:
    """A cluster that is there.

    Attributes:
        workers: How many fit.
        cpus: Of each.
        gpus: Of each, 0 or 1.
        nodes: Machines.
    """

    workers: int
    cpus: int
    gpus: int
    nodes: int

    def __str__(self) -> str:
        kind = "a GPU" if self.gpus else f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"
        workers, machines = (f"{n} {what}{'s' if n > 1 else ''}" for n, what in self._counts)
        return f"{workers} of Ray with {kind} each, on {machines}"

    @property
    def _counts(self) -> tuple[tuple[int, str], ...]:
        return (self.workers, "worker"), (self.nodes, "machine")


@contextmanager
def connected(options: RayOptions) -> Iterator[Connection]:
    """While the block runs; a connection that was there before stays.

    Args:
        options: Which cluster, and what a worker is.

    Raises:
        InputError: Ray is not installed, nothing answers at the address, or no worker fits.
    """
    needs_ray()
    _shared.enter(options.address)
    try:
        yield _looked_at(options)
    finally:
        _shared.leave()


def needs_ray() -> None:
    """Raise InputError where Ray is not installed."""
    if find_spec("ray") is None:
        raise InputError("Ray needs the 'ray' extra: pip install 'tmm-engine[ray]'")


class _Shared:
    """The one connection that a process has, and how many use it."""

    def __init__(self) -> None:
        self._guard, self._users, self._ours = threading.Lock(), 0, False

    def enter(self, address: str) -> None:
        """Connect, where nobody has."""
        import ray

        with self._guard:
            if not ray.is_initialized():
                _connect(address)
                self._users, self._ours = 0, True
            self._users += 1

    def leave(self) -> None:
        """End the connection with the last who uses it, where it was made here."""
        import ray

        with self._guard:
            self._users -= 1
            if self._ours and self._users == 0:
                self._ours = False
                ray.shutdown()


_shared = _Shared()


def _connect(address: str) -> None:
    import ray

    if address not in (AUTO, LOCAL):
        check_address(address)
    where = None if address == AUTO else address
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "lance is not fork-safe")  # Ray starts programs, it does not go on as one
            ray.init(address=where, include_dashboard=False, configure_logging=False, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"Ray at {address!r} cannot be used: {str(error).splitlines()[0]}") from error


def check_address(address: str) -> None:
    """See whether there is Ray at an address.

    Args:
        address: ``HOST:PORT``.

    Raises:
        InputError: nothing answers, or something else, or another version.
    """
    host, port = _host_and_port(address)
    remedy = "start it there (`ray start --head`), or give the address that it printed"
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"Ray: nothing answers at {address} within {CONNECT_SECONDS:g} s ({reason}); {remedy}"
        ) from None
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        found = subprocess.run(command, capture_output=True, timeout=HEALTH_SECONDS, text=True, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"Ray: what answers at {address} did not in {HEALTH_SECONDS:g} s say it is Ray; {remedy}"
        ) from None
    if found.returncode:
        said = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"Ray: what answers at {address} is no cluster for us ({said}); {remedy}")


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError(
            f"Ray: expected an address as HOST:PORT, 'auto' or 'local', got {address!r}; a command for Ray runs on a "
            f"machine of its cluster, since it writes to the path that all machines share"
        )
    return host, int(port)


def _looked_at(options: RayOptions) -> Connection:
    """How many workers fit."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if gpus and not options.device.startswith("cpu"):
        return Connection(gpus, options.cpus, 1, len(nodes))
    workers = sum(int(node.get("CPU", 0)) // options.cpus for node in nodes)
    if not workers:
        most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        raise InputError(
            f"Ray: no worker with {options.cpus} CPUs fits on any machine, the largest has {most}: ask for fewer "
            f"(`cpus=…`)"
        )
    return Connection(workers, options.cpus, 0, len(nodes))
