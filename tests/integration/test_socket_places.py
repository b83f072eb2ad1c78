"""Who gets a place at a crowded Unix socket."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.transports.unix_socket import MAX_CONNECTIONS, USER_CONNECTIONS
from tests.integration.harness import TIMEOUT_S, Daemon, Line, until

STORY = {"prompt": "x", "max_tokens": 1}

HOLD_AS = """
import os, socket, sys
path, uid, many, line = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
os.setgroups([])
os.setuid(uid)
held = []
for _ in range(many):
    held.append(socket.socket(socket.AF_UNIX))
    held[-1].connect(path)
    if line:
        held[-1].sendall(line.encode() + b"\\n")
print("held", flush=True)
sys.stdin.read(1)
for sock in held:
    sock.settimeout(20 if line else 0)
    try:
        said = sock.recv(65536)
    except BlockingIOError:
        said = b"nothing"
    print(said.split(b"\\n")[0].decode() or "closed")
"""


class Crowd:
    """Connections of another user, in a process of its own. line: what each sends."""

    def __init__(self, daemon: Daemon, *, uid: int, many: int, line: str = "") -> None:
        command = [sys.executable, "-c", HOLD_AS, str(daemon.socket), str(uid), str(many), line]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None and self._process.stdout.readline() == "held\n"

    def end(self) -> list[str]:
        """Hang up.  → the first line that each connection got"""
        return self._process.communicate("x", timeout=TIMEOUT_S)[0].splitlines()


@pytest.fixture
def crowds() -> Iterator[list[Crowd]]:
    """Those a test gathers; all are gone at its end."""
    gathered: list[Crowd] = []
    yield gathered
    for crowd in gathered:
        crowd._process.kill()
        crowd._process.communicate()


@pytest.fixture
def open_daemon(debug_bundle: Path) -> Iterator[Daemon]:
    """A daemon whose socket every user may open; a step takes it 50 ms."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own let nobody else in
        folder = Path(name)
        folder.chmod(0o755)
        daemon = Daemon(folder, debug_bundle, "--backend", "fake:50")
        daemon.socket.chmod(0o666)
        yield daemon
        daemon.close()


def test_crowded_socket_closes_the_longest_idle_connection(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(backend="fake:200")
    busy = daemon.line()
    busy.send({"prompt": "Once", "steps": 5})
    until(lambda: daemon.line().ask({"type": "health"})["state"] == "busy", "the story to begin")
    crowd = [Line(daemon.socket) for _ in range(MAX_CONNECTIONS + 10)]
    try:
        assert crowd[-1].ask(STORY | {"id": "last"})["status"] == "ok"
        reply = crowd[0].read()
        assert reply is not None and reply["error"]["code"] == "queue_full"
        assert "was idle" in reply["error"]["message"] and crowd[0].read() is None
        assert (busy.read() or {})["status"] == "ok"
    finally:
        for client in crowd:
            client.close()


def test_refusals_of_the_socket_are_logged_without_their_text(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    line = daemon.line()
    assert line.ask({"prompt": "zanzibar", "id": "a", "seed": -1})["status"] == "error"
    assert line.ask({"prompt": "zanzibar", "id": "b"})["status"] == "ok"
    log = daemon.log.read_text()
    assert f"request a of socket:{os.getuid()}/1: bad_request" in log
    assert f"request b of socket:{os.getuid()}/1: ok" in log
    assert "zanzibar" not in log


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become other users")


@needs_root
def test_idle_connections_of_one_user_lock_nobody_out(open_daemon: Daemon, crowds: list[Crowd]) -> None:
    crowds.append(Crowd(open_daemon, uid=4711, many=MAX_CONNECTIONS))
    crowds.append(Crowd(open_daemon, uid=4712, many=MAX_CONNECTIONS))
    assert open_daemon.line().ask(STORY)["status"] == "ok"  # root: what an upgrade asks
    crowds.append(Crowd(open_daemon, uid=4713, many=1, line='{"type": "health"}'))
    assert '"state"' in crowds[2].end()[0]
    held = crowds[0].end()
    assert sum(line == "nothing" for line in held) <= USER_CONNECTIONS
    assert sum("queue_full" in line for line in held) >= MAX_CONNECTIONS - USER_CONNECTIONS


@needs_root
def test_busy_connections_of_one_user_leave_places_for_others(open_daemon: Daemon, crowds: list[Crowd]) -> None:
    crowds.append(Crowd(open_daemon, uid=4711, many=MAX_CONNECTIONS, line='{"prompt": "x", "steps": 100}'))
    line = open_daemon.line()
    health: dict[str, Any] = line.ask({"type": "health"})
    assert health["state"] == "busy"
    crowds.append(Crowd(open_daemon, uid=4712, many=1, line='{"type": "health"}'))
    assert '"state"' in crowds[1].end()[0]
