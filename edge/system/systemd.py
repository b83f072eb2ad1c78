"""What systemd tells a service, and what it wants to hear: readiness, socket activation, watchdog, priorities.

Standard library only. Started by hand, without systemd's variables, every function here does nothing.
Protocols: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3), sd-daemon(3).
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
from typing import Final

from edge.system.heartbeat import Sign
from shared.errors import ConfigError

log = logging.getLogger(__name__)

FIRST_FD: Final = 3
CHECKS: Final = 4
"""How often the watchdog looks in the time systemd allows: a step may take three quarters of it."""


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
        log.warning("systemd cannot be told %s: %s", lines[0], error.strerror)


def ready(status: str) -> None:
    """Started, or done with a reload. status: one line for `systemctl status`."""
    notify("READY=1", f"STATUS={status}")


def reloading() -> None:
    """A reload begins. The time tells systemd which of several reloads this is; Type=notify-reload needs it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping(within_s: float, status: str = "finishing what was accepted") -> None:
    """The end begins, and may take so long even where TimeoutStopSec is shorter."""
    notify("STOPPING=1", f"STATUS={status}", f"EXTEND_TIMEOUT_USEC={round(within_s * 1e6)}")


def activated_socket() -> socket.socket | None:
    """The listening Unix socket that systemd opened for this process, if it did.

    Its path is systemd's to keep: whoever takes the socket must not remove it. Raises ConfigError when systemd passed
    something else.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return None
    if count != "1" or not stat.S_ISSOCK(os.fstat(FIRST_FD).st_mode):
        raise ConfigError(f"systemd passed {count} file descriptors: the socket unit must open exactly one socket")
    listener = socket.socket(fileno=FIRST_FD)
    listener.set_inheritable(False)
    listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM or not listens:
        raise ConfigError("systemd passed another kind of socket: the socket unit needs one ListenStream=/path")
    return listener


def watchdog_interval_s() -> float | None:
    """How long systemd waits for a sign of life; None when it does not watch this process."""
    micros, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
    if not micros.isdecimal() or int(micros) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(micros) / 1e6


class Watchdog:
    """Feeds systemd's watchdog as long as work goes on everywhere, in a thread of its own.

    signs: of the threads that serve, by their names. While one of them has work and stands still nothing is fed, and
    systemd starts the daemon again.
    """

    def __init__(self, signs: Mapping[str, Sign]) -> None:
        self._signs = signs
        self._seen: dict[str, int] = {}
        self._unfed = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to feed, if systemd watches."""
        if watchdog_interval_s() is not None:
            self._thread.start()

    def stop(self) -> None:
        """No longer feed."""
        self._ended.set()

    def _run(self) -> None:
        interval_s = watchdog_interval_s()
        assert interval_s is not None
        while True:
            if stuck := self._stuck():
                self._unfed += 1
                if self._unfed == CHECKS // 2:  # once may be a moment between two steps
                    log.error("no progress in %s: systemd will start the daemon again", ", ".join(stuck))
            else:
                self._unfed = 0
                notify("WATCHDOG=1")
            if self._ended.wait(interval_s / CHECKS):
                return

    def _stuck(self) -> list[str]:
        """Who has work and did none of it since the last look."""
        stuck = []
        for name, sign in self._signs.items():
            count, has_work = sign()
            if has_work and self._seen.get(name) == count:
                stuck.append(name)
            self._seen[name] = count
        return stuck


def on_journal() -> bool:
    """Whether stderr goes straight to the journal, which reads priorities; a redirected one goes elsewhere."""
    found = os.fstat(sys.stderr.fileno())
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class JournalFormatter(logging.Formatter):
    """Lines the journal files under their priority: `<4>…` is a warning. A traceback's lines all carry theirs."""

    def format(self, record: logging.LogRecord) -> str:
        """The record with its priority before every line."""
        level = next(p for least, p in ((50, 2), (40, 3), (30, 4), (20, 6), (0, 7)) if record.levelno >= least)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).splitlines())


def credential(name: str) -> Path | None:
    """The file of a credential, if the unit loads one of that name."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return Path(folder) / name if folder and (Path(folder) / name).is_file() else None
