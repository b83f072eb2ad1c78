"""The service manager's protocols, against real sockets and a real journal stream's rules."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from edge.config import MqttConfig, read_password
from edge.system import systemd
from edge.system.heartbeat import Heartbeat
from edge.system.systemd import JournalFormatter, Watchdog, on_journal, watchdog_interval_s


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket that systemd would listen on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield heard


def told(manager: socket.socket) -> dict[str, str]:
    lines = manager.recv(4096).decode().split("\n")
    return dict(line.split("=", 1) for line in lines)


def test_systemd_ready_carries_a_status(manager: socket.socket) -> None:
    systemd.ready("serving debug")
    assert told(manager) == {"READY": "1", "STATUS": "serving debug"}


def test_systemd_reloading_carries_its_start_time(manager: socket.socket) -> None:
    before_us = time.monotonic_ns() // 1000
    systemd.reloading()
    sent = told(manager)
    assert sent["RELOADING"] == "1"
    assert before_us <= int(sent["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000


def test_systemd_stopping_asks_for_the_time_it_needs(manager: socket.socket) -> None:
    systemd.stopping(35.5)
    sent = told(manager)
    assert (sent["STOPPING"], sent["EXTEND_TIMEOUT_USEC"]) == ("1", "35500000")


def test_systemd_notify_reaches_an_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"edgelm-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"\0{name}")
        heard.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        systemd.notify("READY=1")
        assert heard.recv(100) == b"READY=1"


def test_systemd_functions_do_nothing_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "WATCHDOG_USEC", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    systemd.ready("")
    assert systemd.activated_sockets() == (None, ())
    assert watchdog_interval_s() is None
    assert systemd.credential("mqtt.password") is None


def test_systemd_notify_to_a_closed_manager_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    systemd.ready("")
    assert "READY=1" in caplog.text


def test_activated_sockets_leave_descriptors_of_another_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert systemd.activated_sockets() == (None, ())


PASSED = """
import os, socket
from edge.system import systemd
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str({count}))
try:
    unix, http = systemd.activated_sockets()
    print(unix is not None, [listener.getsockname()[1] for listener in http], "LISTEN_FDS" in os.environ)
except Exception as error:
    print(type(error).__name__, error)
"""


def passed(*sockets: socket.socket) -> str:
    """What a process makes of these sockets, which it has as file descriptors 3, 4, …"""
    fds = " ".join(f"{3 + n}<&{sock.fileno()}" for n, sock in enumerate(sockets))
    command = ["bash", "-c", f'exec "$0" -c "$1" {fds}', sys.executable, PASSED.format(count=len(sockets))]
    done = subprocess.run(
        command, pass_fds=[s.fileno() for s in sockets], check=True, capture_output=True, text=True, timeout=30
    )
    return done.stdout.strip()


def test_activated_sockets_are_told_apart_by_their_family(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as http, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        unix.listen()
        port = http.getsockname()[1]
        assert passed(unix, http) == passed(http, unix) == f"True [{port}] False"
        assert passed(http) == f"False [{port}] False"
        assert "ConfigError systemd passed 2 Unix sockets" in passed(unix, unix)


def test_activated_sockets_refuse_what_does_not_listen() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, socket.socket() as silent:
        assert "ConfigError systemd passed another kind of socket" in passed(datagrams)
        assert "ConfigError systemd passed another kind of socket" in passed(silent)


@pytest.mark.parametrize(("usec", "pid", "expected"), [("3000000", None, 3.0), ("3", "1", None), ("0", None, None)])
def test_watchdog_interval_is_for_the_named_process(
    usec: str, pid: str | None, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", pid or str(os.getpid()))
    assert watchdog_interval_s() == expected


def test_watchdog_is_fed_unless_some_thread_stands_still_at_its_work(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "40000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    passes = count()
    outbox = Heartbeat()
    watchdog = Watchdog({"scheduler": lambda: (next(passes), True), "outbox": outbox})
    watchdog.start()
    assert [told(manager) for _ in range(3)] == [{"WATCHDOG": "1"}] * 3  # passes are made, the outbox waits for work

    with outbox:
        manager.settimeout(0.2)
        with pytest.raises(TimeoutError):
            for _ in range(100):
                told(manager)  # what was sent before, then silence
    assert "no progress in outbox" in caplog.text

    manager.settimeout(20)
    assert told(manager) == {"WATCHDOG": "1"}  # the outbox is done with it
    watchdog.stop()


def test_heartbeat_counts_pieces_of_work_and_the_end_of_its_thread() -> None:
    thread = threading.Thread(target=lambda: None)
    heartbeat = Heartbeat(thread)
    thread.start()
    thread.join()
    assert heartbeat() == (0, True)  # nothing will ever be done here

    heartbeat = Heartbeat()
    seen = []
    heartbeat.around(lambda value: seen.append((value, heartbeat())))("work")
    assert seen == [("work", (1, True))]
    assert heartbeat() == (1, False)


def record(level: int, text: str) -> logging.LogRecord:
    return logging.LogRecord("edgelm", level, "", 0, text, (), None)


def test_journal_formatter_puts_the_priority_before_every_line() -> None:
    formatter = JournalFormatter()
    assert formatter.format(record(logging.INFO, "hello")) == "<6>hello"
    assert formatter.format(record(logging.WARNING, "a\nb")) == "<4>a\n<4>b"
    assert formatter.format(record(logging.ERROR, "a")) == "<3>a"


def test_on_journal_is_true_only_for_the_stream_of_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "stderr").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        found = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        assert on_journal()
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino + 1}")
        assert not on_journal()
        monkeypatch.delenv("JOURNAL_STREAM")
        assert not on_journal()


def test_credential_outside_of_the_service_is_the_file_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For root's `edgelm doctor`."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.setattr(systemd, "CREDENTIALS", tmp_path)
    assert systemd.credential("mqtt.password") is None
    (tmp_path / "mqtt.password").write_text("s3cret\n")
    assert read_password(MqttConfig(username="edge01")) == "s3cret"
    assert read_password(MqttConfig()) is None


def test_credential_is_the_password_unless_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    login = MqttConfig(username="edge01")
    assert read_password(login) is None
    (tmp_path / "mqtt.password").write_text("")
    assert read_password(login) is None
    (tmp_path / "mqtt.password").write_text("loaded\n")
    assert read_password(login) == "loaded"
    assert read_password(MqttConfig()) is None
    (tmp_path / "own").write_text("own\n")
    assert read_password(MqttConfig(username="edge01", password_file=tmp_path / "own")) == "own"
