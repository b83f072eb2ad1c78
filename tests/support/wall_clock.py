"""A process whose wall clock can be set while it runs, without anybody else noticing.

Setting the machine's own clock would move it for everyone on it; a time namespace has no wall clock of its own, only
monotonic ones; and libfaketime 0.9.10 breaks the monotonic sleeps of Python 3.11. So a few lines of C stand between
the process and libc's readings of the wall clock, and add what a file says.
"""

import mmap
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Final

COMPILER: Final = shutil.which("cc")


class WallClock:
    """How far off the wall clock is, for the processes that get its `environment`. Needs a C compiler."""

    def __init__(self, folder: Path) -> None:
        assert COMPILER is not None
        library, offset = folder / "wall_clock.so", folder / "wall_clock.offset"
        flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        source = str(Path(__file__).with_suffix(".c"))
        subprocess.run([COMPILER, *flags, source, "-o", str(library), "-ldl"], check=True)
        offset.write_bytes(bytes(8))
        with offset.open("r+b") as file:
            self._offset_s = mmap.mmap(file.fileno(), 8)
        self.environment = {"LD_PRELOAD": str(library), "WALL_CLOCK_OFFSET": str(offset)}

    def set(self, offset_s: int) -> None:
        """So far from the true time, from now on."""
        self._offset_s[:] = struct.pack("=q", offset_s)

    def close(self) -> None:
        """No longer to be set."""
        self._offset_s.close()
