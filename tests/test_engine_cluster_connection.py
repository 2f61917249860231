"""Addresses of Ray, and who may work together: without a cluster."""

import socket
import time

import pytest
from click.testing import CliRunner

from tmm_engine import RayOptions
from tmm_engine.cli.main import main
from tmm_engine.cluster import connection
from tmm_engine.cluster.identity import Identity
from tmm_engine.index.errors import IndexStateError, InputError


@pytest.mark.parametrize(
    "address", ["", "head", "head:", ":6379", "head:x", "head:0", "head:70000", "ray://head:10001"]
)
def test_addresses_are_hosts_with_ports(address: str) -> None:
    with pytest.raises(InputError, match="expected an address as HOST:PORT, 'auto' or 'local', got"):
        RayOptions(address=address)


def test_what_an_argument_may_be() -> None:
    assert RayOptions.of(None) is RayOptions.of(False) is None
    assert RayOptions.of(True) == RayOptions()
    assert RayOptions.of("head:6379") == RayOptions(address="head:6379")
    assert RayOptions.of(RayOptions(cpus=4)) == RayOptions(cpus=4)
    for cpus in (0, -1, True):
        with pytest.raises(InputError, match="cpus: expected a whole number of at least 1"):
            RayOptions(cpus=cpus)


def test_an_address_where_nothing_listens_is_told_at_once() -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputError, match=f"nothing answers at 127.0.0.1:{port} within 5 s"):
        connection.check_address(f"127.0.0.1:{port}")


@pytest.mark.slow
def test_a_port_of_another_program_is_told_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(connection, "HEALTH_SECONDS", 5.0)
    with socket.create_server(("0.0.0.0", 0)) as other:
        start = time.monotonic()
        with pytest.raises(InputError, match=r"what answers at .* did not in 5 s say it is Ray"):
            connection.check_address(f"127.0.0.1:{other.getsockname()[1]}")
        assert time.monotonic() - start < 20


def test_others_than_ourselves_are_named_with_what_differs() -> None:
    own = Identity.own()
    own.check(Identity(dict(own.versions)), "here")
    with pytest.raises(IndexStateError, match=r"on node-7 has torch 1.0 instead of .*, faiss-cpu missing instead of"):
        rest = {name: value for name, value in own.versions.items() if name != "faiss-cpu"}
        own.check(Identity(rest | {"torch": "1.0"}), "node-7")


def test_the_command_line_refuses_workers_without_a_cluster() -> None:
    answer = CliRunner().invoke(main, ["build-index", "photos", "x.idx", "--model", "resnet18", "--ray-cpus", "2"])
    assert answer.exit_code == 2
    assert "--ray-cpus has no effect without --ray" in answer.output
