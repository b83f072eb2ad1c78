"""Waiting for the GPU must not hold Python's lock: the daemon's other threads answer meanwhile.

cuda-bindings 12.9.0, asked by the same script, lets another thread run once in half a second; the versions that
pyproject.toml admits a hundred times.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tests.support
from tests.support.packages import installed

pytestmark = pytest.mark.proof("4. the TensorRT backend over a recording driver, and below NVIDIA's own bindings")

SOURCE = Path(tests.support.__path__[0]) / "slow_cuda.c"
SCRIPT = """
import threading, time
from cuda.bindings import driver

turns = 0
def run() -> None:
    global turns
    while True:
        turns += 1
        time.sleep(0.005)

threading.Thread(target=run, daemon=True).start()
time.sleep(0.05)
before = turns
assert driver.cuEventSynchronize(driver.CUevent(0))[0] == 0  # half a second
print(turns - before)
"""


def turns_while_waiting(folder: Path, version: str) -> int:
    """How often another thread ran in the half second."""
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(installed(f"cuda-bindings=={version}"))},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return int(done.stdout)


@pytest.mark.parametrize("version", ["12.9.2", "12.9.10", "13.0.3", "13.5.0"])
def test_gil_is_released_while_the_gpu_works(version: str, tmp_path: Path) -> None:
    """The first and the last of each major version."""
    assert turns_while_waiting(tmp_path, version) >= 10


def test_gil_is_held_by_the_version_below_the_floor(tmp_path: Path) -> None:
    """So the figure above measures what it says."""
    assert turns_while_waiting(tmp_path, "12.9.0") <= 3
