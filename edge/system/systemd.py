"""The protocols between systemd and a service: readiness, socket activation, watchdog, priorities, credentials.

Without systemd's environment variables, as when started by hand, every function does nothing.
See sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3), sd-daemon(3).
"""

import logging
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from edge.system.heartbeat import Sign
from shared.errors import ConfigError

log = logging.getLogger(__name__)

FIRST_FD: Final = 3
CREDENTIALS: Final = Path("/etc/edgelm")
"""Where the unit loads its credentials from."""
CHECKS: Final = 4
"""Checks per watchdog interval: a step may take three quarters of it."""


def notify(*lines: str) -> None:
    """Send assignments such as `READY=1` to the service manager."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.connect("\0" + address[1:] if address.startswith("@") else address)
            manager.sendall("\n".join(lines).encode())
    except OSError as error:
        log.warning("systemd cannot be notified of %s: %s", lines[0], error.strerror)


def ready(status: str) -> None:
    """Started, or done with a reload. status: one line for `systemctl status`."""
    notify("READY=1", f"STATUS={status}")


def reloading() -> None:
    """A reload begins. Type=notify-reload needs its start time."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping(within_s: float, status: str = "finishing accepted requests") -> None:
    """Shutdown begins, and may take `within_s` even where TimeoutStopSec is shorter."""
    notify("STOPPING=1", f"STATUS={status}", f"EXTEND_TIMEOUT_USEC={round(within_s * 1e6)}")


class Activated(NamedTuple):
    """Listening sockets that systemd opened for this process: at most one Unix socket, and any number for HTTP."""

    unix: socket.socket | None
    http: tuple[socket.socket, ...]


def activated_sockets() -> Activated:
    """The sockets that systemd passes; none without it. They belong to systemd: a path must not be removed.

    Raises ConfigError when systemd passed anything else.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return Activated(None, ())
    passed = [_listener(FIRST_FD + number) for number in range(int(count) if count.isdecimal() else 0)]
    unix = [listener for listener in passed if listener.family == socket.AF_UNIX]
    if len(unix) > 1:
        raise ConfigError(f"systemd passed {len(unix)} Unix sockets: the socket units must open at most one")
    return Activated(unix[0] if unix else None, tuple(listener for listener in passed if listener not in unix))


def _listener(fd: int) -> socket.socket:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise ConfigError("systemd passed a file that is no socket: the socket units need ListenStream= alone")
    listener = socket.socket(fileno=fd)
    listener.set_inheritable(False)
    listens = listener.type == socket.SOCK_STREAM and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if listener.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) or not listens:
        raise ConfigError("systemd passed another kind of socket: the socket units need ListenStream= alone")
    return listener


def watchdog_interval_s() -> float | None:
    """The watchdog interval of this process; None without one."""
    micros, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not micros.isdecimal() or int(micros) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(micros) / 1e6


class Watchdog:
    """Notifies systemd's watchdog from a thread of its own while every serving thread makes progress.

    signs: of the serving threads, by name. While one has work and makes no progress, no notification is sent, and
    systemd restarts the daemon.
    """

    def __init__(self, signs: Mapping[str, Sign]) -> None:
        self._signs = signs
        self._seen: dict[str, int] = {}
        self._missed = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start, if systemd expects notifications."""
        if watchdog_interval_s() is not None:
            self._thread.start()

    def stop(self) -> None:
        """Stop notifying."""
        self._ended.set()

    def _run(self) -> None:
        interval_s = watchdog_interval_s()
        assert interval_s is not None
        while True:
            if stuck := self._stuck():
                self._missed += 1
                if self._missed == CHECKS // 2:  # one check may fall between two steps
                    log.error("no progress in %s: systemd will restart the daemon", ", ".join(stuck))
            else:
                self._missed = 0
                notify("WATCHDOG=1")
            if self._ended.wait(interval_s / CHECKS):
                return

    def _stuck(self) -> list[str]:
        """Names of the threads that have work and made no progress since the last check."""
        stuck = []
        for name, sign in self._signs.items():
            count, has_work = sign()
            if has_work and self._seen.get(name) == count:
                stuck.append(name)
            self._seen[name] = count
        return stuck


def on_journal() -> bool:
    """Whether stderr is connected to the journal, which reads priorities."""
    stderr = os.fstat(sys.stderr.fileno())
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


class JournalFormatter(logging.Formatter):
    """Prefixes lines with their priority for the journal: `<4>…` is a warning. A traceback has it on every line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, its priority before every line."""
        level = next(p for least, p in ((50, 2), (40, 3), (30, 4), (20, 6), (0, 7)) if record.levelno >= least)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).splitlines())


def credential(name: str) -> Path | None:
    """The file of a credential that the unit loads, if it does; outside of the service the file that it is loaded from,
    if this user may read it, so that root's `edgelm doctor` logs in as the daemon does.
    """
    file = Path(os.environ.get("CREDENTIALS_DIRECTORY") or CREDENTIALS) / name
    return file if os.access(file, os.R_OK) and file.is_file() else None
