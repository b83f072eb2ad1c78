"""Counts abnormal ends of the daemon on the GPU: after two it serves from the CPU.

A process is counted before it uses the GPU, so that crashes and hangs count like reported failures. A clean end clears
the count: `systemctl restart` tries the GPU again.
"""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from shared.errors import DeviceError

FILE: Final = "gpu-deaths.json"
MOST: Final = 2
WITHIN_S: Final = 3600.0
BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


class Start(msgspec.Struct, frozen=True):
    """A process that began to use the GPU. boot: a reboot may repair a GPU, so only this boot's processes count."""

    boot: str
    uptime_s: float
    pid: int


class GpuDeaths:
    """The count, in a file of the state folder."""

    def __init__(self, state: Path) -> None:
        self._file = state / FILE

    def too_many(self) -> str | None:
        """Why the GPU must not be used; None while it may."""
        deaths = len([start for start in self._starts() if start.pid != os.getpid()])
        if deaths < MOST:
            return None
        return f"the daemon died {deaths} times on the GPU within an hour; `systemctl restart edgelm` tries it again"

    def begin(self) -> None:
        """Count this process, which is about to use the GPU. Raises DeviceError when that cannot be written."""
        mine = Start(_boot(), _uptime_s(), os.getpid())
        self._write([*(start for start in self._starts() if start.pid != mine.pid), mine])

    def end(self) -> None:
        """This process ends cleanly."""
        self._file.unlink(missing_ok=True)

    def cancel(self) -> None:
        """This process does not use the GPU after all."""
        self._write([start for start in self._starts() if start.pid != os.getpid()])

    def _starts(self) -> list[Start]:
        with suppress(OSError, msgspec.MsgspecError):  # absent or damaged: counts as empty
            found = msgspec.json.decode(self._file.read_bytes(), type=list[Start])
            return [s for s in found if s.boot == _boot() and _uptime_s() - s.uptime_s < WITHIN_S]
        return []

    def _write(self, starts: list[Start]) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._file.with_suffix(".new")
            fresh.write_bytes(msgspec.json.encode(starts))
            fresh.replace(self._file)
        except OSError as error:
            raise DeviceError(f"{self._file} cannot be written: {error.strerror or error}") from None


def _boot() -> str:
    return BOOT.read_text().strip()


def _uptime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
