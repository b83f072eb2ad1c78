"""The kernels on a processor: compiled by the system's compiler, each CUDA thread a fiber."""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.backends.trt import kernels

HERE = Path(__file__).parent
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
# Symbolic: a process may hold the kernels twice, by themselves and in the driver, each with its own threads.
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fPIC", "-shared", "-Wl,-Bsymbolic")

Array = NDArray[Any]


def build(folder: Path, threads: int) -> "Emulator":
    """Compile the kernels for blocks of so many threads; skips where no C++ compiler is installed."""
    library = folder / f"emulator-{threads}.so"
    compile_library("emulator.cpp", library, f"-DTHREADS={threads}")
    return Emulator(ctypes.CDLL(str(library)))


def build_driver(folder: Path) -> None:
    """Compile a libcuda.so.1, for a process that finds it by LD_LIBRARY_PATH; skips as above."""
    compile_library("libcuda.cpp", folder / "libcuda.so.1", "-DTHREADS=64", "-Wl,-soname,libcuda.so.1", "-ldl")


def compile_library(source: str, library: Path, *flags: str) -> None:
    """source: a file beside this one, or an absolute path. Skips where no C++ compiler is installed."""
    if COMPILER is None:
        pytest.skip("no C++ compiler is installed (apt: g++)")
    include = Path(kernels.__file__).parent
    command = [COMPILER, *FLAGS, f"-I{include}", str(HERE / source), "-o", str(library), *flags]
    subprocess.run(command, check=True)


@dataclass(frozen=True)
class Emulator:
    """Calls into the compiled kernels. Arrays are passed by address: C-contiguous, of the kernels' dtypes."""

    library: ctypes.CDLL

    def call(self, name: str, *arguments: Array | int | float) -> int:
        """Call a function that returns int, or nothing."""
        return int(getattr(self.library, name)(*(_argument(a) for a in arguments)))

    def time_at(self, schedule: int, masked: int, positions: int) -> float:
        """time_of(), the one function that returns a float."""
        function = self.library.time_at
        function.restype = ctypes.c_float
        return float(function(schedule, masked, positions))

    def launch(
        self, name: str, grid: tuple[int, int, int], arguments: Sequence[Array | int], backwards: bool = False
    ) -> None:
        """Run a kernel over a grid. arguments: arrays, addresses above 2³¹, and numbers, in the kernel's order."""
        values = [_argument(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        failed = self.library.launch(name.encode(), *grid, addresses, int(backwards))
        assert failed != 2, f"there is no kernel {name}"
        assert not failed, "threads of a block do not meet at its barriers"

    def draw(
        self, logits: Array, canvas: Array, fill: Array, rows: Array, candidates: Array, backwards: bool = False
    ) -> None:
        """The first kernel over logits (B, L, V)."""
        b, length, vocab = logits.shape
        arguments = (logits, canvas, fill, rows, candidates, length, vocab)
        self.launch(kernels.DRAW, (length, b, 1), arguments, backwards)

    def commit(
        self,
        canvas: Array,
        fill: Array,
        rows: Array,
        ratios: Array,
        candidates: Array,
        t: Array,
        whole_length: int,
        schedule: int = 0,
        backwards: bool = False,
    ) -> None:
        """The second kernel over a canvas (B, L)."""
        b, length = canvas.shape
        arguments = (canvas, fill, rows, ratios, candidates, t, length, ratios.shape[1], whole_length, schedule)
        self.launch(kernels.COMMIT, (b, 1, 1), arguments, backwards)


def _argument(value: Array | int | float) -> Any:
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_uint64(value) if value >= 2**31 else ctypes.c_int(value)
