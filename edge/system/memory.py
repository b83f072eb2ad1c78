"""Memory of this process and of this machine, in megabytes of 10^6 bytes."""

import mmap
import re
from pathlib import Path


def resident_mb() -> float:
    """What this process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * mmap.PAGESIZE / 1e6, 1)


def available_mb() -> float | None:
    """What programs on this machine can still take; None where the kernel does not say."""
    found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return None if found is None else round(int(found[1]) * 1024 / 1e6, 1)
