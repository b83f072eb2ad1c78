"""Memory of this process and of this machine, in megabytes of 10^6 bytes."""

import ctypes
import mmap
import re
from contextlib import suppress
from pathlib import Path
from typing import Final

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
LARGE: Final = 1 << 20
"""Bytes of what is mapped by itself, and so given back as soon as it is freed: files, large weights."""
SPARE: Final = 4 << 20
"""Free bytes at the end of the heap that are kept: with few, each pass would ask the kernel for them again."""


def give_back_freed() -> None:
    """Have the C library return what is freed. By itself it maps nothing more alone that is smaller than the largest
    block freed before, such as a bundle's file, and what was freed among smaller blocks stays.

    Only glibc has these settings; elsewhere nothing happens.
    """
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, SPARE)


def resident_mb() -> float:
    """What this process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * mmap.PAGESIZE / 1e6, 1)


def available_mb() -> float | None:
    """What programs on this machine can still take; None where the kernel does not say."""
    found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return None if found is None else round(int(found[1]) * 1024 / 1e6, 1)
