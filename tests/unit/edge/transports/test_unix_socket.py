"""One connection of the Unix socket: what it reads and serves in a turn. The whole of it: tests/integration."""

import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.scheduler import Scheduler
from edge.transports.socket_connection import Connection
from shared.messages import MAX_MESSAGE_BYTES

Ends = tuple[socket.socket, Connection]


@pytest.fixture
def ends(debug_bundle: Path) -> Iterator[Ends]:
    """A client, and the daemon's end of its connection."""
    client, ours = socket.socketpair()
    client.settimeout(20)
    connection = Connection(
        ours, Scheduler(LoadedBundle.load(debug_bundle, "fake"), queue_size=1), uid=0, name="test", wake=lambda: None
    )
    yield client, connection
    connection.close()
    client.close()


def test_unix_socket_serves_one_line_of_a_client_a_turn(ends: Ends) -> None:
    client, connection = ends
    client.sendall(b'{"type": "health"}\n' * 100)
    connection.receive()
    for _ in range(100):
        assert connection.answer_line()
        assert client.recv(65536).count(b"\n") == 1
    assert not connection.answer_line()


def test_unix_socket_reads_no_more_than_it_can_serve_soon(ends: Ends) -> None:
    client, connection = ends
    for _ in range(2):
        client.sendall(b"\n" * MAX_MESSAGE_BYTES)
        assert connection.events & select.POLLIN
        connection.receive()
    assert not connection.events & select.POLLIN
    while connection.answer_line():
        pass
    assert connection.events & select.POLLIN
