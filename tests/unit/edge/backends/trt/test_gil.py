"""Waiting for the GPU must not hold Python's lock: the daemon's other threads answer meanwhile.

cuda-bindings 12.9.0, asked by the same script, lets another thread run once in half a second; 13.5 a hundred times.
"""

import subprocess
import sys
from pathlib import Path

import pytest

import tests.support

pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
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


def test_gil_is_released_while_the_gpu_works(tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert int(done.stdout) >= 10
