"""The daemon's life: start, what it refuses to start on, and every way to stop."""

import fcntl
import os
import pty
import signal
import socket as sockets
import stat
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge.serving.request_table import ACTIVE
from tests.integration.harness import TIMEOUT_S, Daemon, Line, clean_environment, run_module, until

STORY = {"prompt": "Once upon a time"}
StartDaemon = Callable[..., Daemon]


def begin_story(daemon: Daemon, **fields: object) -> Line:
    """A line whose story has begun, as its first snapshot tells."""
    line = daemon.line()
    first = line.ask(STORY | {"stream": True} | fields)
    assert first["type"] == "partial"
    return line


def final(line: Line) -> dict[str, Any]:
    """The response behind the snapshots."""
    while (reply := line.read() or {})["type"] == "partial":
        pass
    return reply


def test_daemon_ready_line_says_where_and_what(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    assert f"socket {daemon.socket}, mqtt off, bundle debug@" in daemon.ready


def test_daemon_socket_is_for_owner_and_group(start_daemon: StartDaemon) -> None:
    mode = start_daemon().socket.stat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o660


def test_daemon_serves_the_real_graph_with_onnx_runtime(start_daemon: StartDaemon) -> None:
    reply = start_daemon(backend="ort").line().ask(STORY | {"seed": 1})
    assert reply["status"] == "ok" and str(reply["text"]).startswith("Once upon a time")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_daemon_stop_finishes_accepted_requests_and_refuses_new_ones(start_daemon: StartDaemon, number: int) -> None:
    daemon = start_daemon(backend="fake:50")
    line, late = begin_story(daemon, steps=30), daemon.line()
    daemon.signal(number)
    until(lambda: late.ask({"type": "health"})["state"] == "draining", "the drain to begin")

    assert late.ask(STORY)["error"]["code"] == "draining"
    assert final(line)["status"] == "ok"
    assert daemon.exit_code() == 0
    assert not daemon.socket.exists()


def test_daemon_drain_beyond_its_limit_ends_in_typed_errors(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(backend="fake:50", DRAIN_S="0.1")
    running, others, health = begin_story(daemon), daemon.line(), daemon.line()
    others.send(*[STORY] * ACTIVE)  # with the first, one more than take turns
    until(lambda: health.ask({"type": "health"})["queued"] == 1, "the last story to wait")
    daemon.signal(signal.SIGTERM)

    assert final(running)["error"]["code"] == "draining"
    assert {final(others)["error"]["code"] for _ in range(ACTIVE)} == {"draining"}
    assert daemon.exit_code() == 0


def test_daemon_drain_is_cut_short_by_a_second_signal(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(backend="fake:50")
    line, other = begin_story(daemon), daemon.line()
    daemon.signal(signal.SIGTERM)
    until(lambda: other.ask({"type": "health"})["state"] == "draining", "the drain to begin")
    daemon.signal(signal.SIGTERM)

    assert final(line)["error"]["code"] == "draining"
    assert daemon.exit_code() == 0


def listens(path: Path) -> bool:
    """A socket's file is there a moment before anybody listens."""
    try:
        Line(path).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("nohup", [False, True])
def test_daemon_ends_with_its_terminal_and_at_no_other_hangup(tmp_path: Path, debug_bundle: Path, nohup: bool) -> None:
    leader, follower = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(follower, termios.TIOCSCTTY, 0)
        if nohup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    log, path = tmp_path / "log", tmp_path / "s"
    flags = ("--backend", "fake:20", "--bundle", str(debug_bundle), "--socket", str(path))
    command = [sys.executable, "-m", "edge", *flags]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            env=clean_environment(),
            stdin=follower,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
    os.close(follower)
    try:
        until(lambda: listens(path), "the daemon to listen")
        line = Line(path)
        assert line.ask({"type": "health"})["state"] == "idle"
        process.send_signal(signal.SIGHUP)
        until(lambda: log.read_text().count("reloaded") == 1, "the reload")
        assert line.ask(STORY | {"stream": True, "steps": 30})["type"] == "partial"  # it was accepted before the end
        os.close(leader)
        assert final(line)["status"] == "ok"
        if nohup:
            process.send_signal(signal.SIGHUP)
            until(lambda: log.read_text().count("reloaded") >= 2, "the reload")
            process.terminate()
        assert process.wait(TIMEOUT_S) == 0 and not path.exists()
        line.close()
    finally:
        process.kill()
        process.wait()


def test_daemon_replaces_the_socket_of_a_killed_daemon(start_daemon: StartDaemon) -> None:
    killed = start_daemon()
    killed.signal(signal.SIGKILL)
    killed.exit_code()
    assert killed.socket.exists()

    assert start_daemon().line().ask(STORY)["status"] == "ok"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become other users")
def test_daemon_refuses_the_dead_socket_of_another_user_in_one_sentence(debug_bundle: Path) -> None:
    """In a folder where each may remove only his own, as in /tmp."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o1777)
        with sockets.socket(sockets.AF_UNIX) as dead:
            dead.bind(str(folder / "s"))
        (folder / "s").chmod(0o777)
        script = (
            "import os, sys; from pathlib import Path; from edge.transports.unix_socket import _clear_stale;"
            "os.setgroups([]); os.setuid(4711); _clear_stale(Path(sys.argv[1]))"
        )
        done = subprocess.run([sys.executable, "-c", script, str(folder / "s")], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("shared.errors.ConfigError") and "a dead socket of root is there" in last


def test_daemon_leaves_a_served_socket_alone(start_daemon: StartDaemon, debug_bundle: Path) -> None:
    first = start_daemon()
    second = run_module("edge", "--backend", "fake", "--bundle", str(debug_bundle), "--socket", str(first.socket))

    assert second.returncode == 78
    assert f"socket {first.socket} is already served by another daemon" in second.stderr
    assert first.line().ask(STORY)["status"] == "ok"


def test_daemon_does_not_remove_the_socket_of_its_successor(start_daemon: StartDaemon) -> None:
    first = start_daemon()
    first.socket.unlink()
    second = start_daemon()
    first.signal(signal.SIGTERM)
    first.exit_code()

    assert second.line().ask(STORY)["status"] == "ok"


def taken_by_a_file(folder: Path) -> list[str]:
    (folder / "s").write_text("precious")
    return ["--socket", str(folder / "s")]


def in_no_folder(folder: Path) -> list[str]:
    return ["--socket", str(folder / "no" / "s")]


def with_too_long_a_path(folder: Path) -> list[str]:
    return ["--socket", str(folder / ("s" * 120))]


def no_bundle(folder: Path) -> list[str]:
    return ["--bundle", str(folder)]


def unknown_key(folder: Path) -> list[str]:
    (folder / "edgelm.toml").write_text('sokcet = "/tmp/s"')
    return ["--config", str(folder / "edgelm.toml")]


def unknown_backend(folder: Path) -> list[str]:
    return ["--backend", "abacus"]


def no_password_file(folder: Path) -> list[str]:
    text = f'[mqtt]\nhost = "127.0.0.1"\nusername = "me"\npassword_file = "{folder}/none"'
    (folder / "edgelm.toml").write_text(text)
    return ["--config", str(folder / "edgelm.toml")]


def no_state_folder(folder: Path) -> list[str]:
    (folder / "taken").write_text("precious")
    text = f'state = "{folder}/taken"\n[mqtt]\nhost = "127.0.0.1"'
    (folder / "edgelm.toml").write_text(text)
    return ["--config", str(folder / "edgelm.toml")]


def no_certificates(folder: Path) -> list[str]:
    (folder / "edgelm.toml").write_text('[mqtt]\nhost = "127.0.0.1"\nca_file = "edgelm.toml"')
    return ["--config", str(folder / "edgelm.toml")]


@pytest.mark.parametrize(
    ("arrange", "exit_code", "named"),
    [
        (taken_by_a_file, 78, "is not a socket"),
        (in_no_folder, 78, "No such file or directory"),
        (with_too_long_a_path, 78, "too long"),
        (no_bundle, 66, "manifest.json"),
        (unknown_key, 78, "sokcet"),
        (unknown_backend, 78, "abacus"),
        (no_password_file, 78, "password_file"),
        (no_certificates, 78, "ca_file"),
        (no_state_folder, 78, "journal"),
    ],
)
def test_daemon_says_in_one_line_why_it_cannot_start(
    arrange: Callable[[Path], list[str]], exit_code: int, named: str, tmp_path: Path, debug_bundle: Path
) -> None:
    bundle, socket = str(debug_bundle), str(tmp_path / "free")
    result = run_module("edge", *arrange(tmp_path), BUNDLE=bundle, BACKEND="fake", SOCKET=socket)

    assert result.returncode == exit_code
    assert result.stderr.startswith("error: ") and named in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert not (tmp_path / "free").exists()


def test_daemon_that_refuses_to_start_does_no_harm(tmp_path: Path, debug_bundle: Path) -> None:
    taken_by_a_file(tmp_path)
    run_module("edge", "--bundle", str(debug_bundle), "--backend", "fake", "--socket", str(tmp_path / "s"))
    assert (tmp_path / "s").read_text() == "precious"


def test_daemon_help_shows_an_example() -> None:
    result = run_module("edge", "--help")
    assert result.returncode == 0 and "python -m edge --mqtt broker.local" in result.stdout


def test_daemon_stop_does_not_wait_for_idle_connections(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    idle = sockets.socket(sockets.AF_UNIX)
    idle.connect(str(daemon.socket))
    daemon.signal(signal.SIGTERM)
    assert daemon.exit_code() == 0
    idle.close()
