"""NVIDIA's own Python bindings: every name we use is in each version, and they take our arguments for what we mean.

tests/gpu, the real backend and all, runs on an emulated libcuda below the real bindings. Its streams do nothing until
somebody waits for them, so a result read too early is wrong here, too.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.emulator import build_driver
from tests.support.emulator.fakes import PARAMETERS
from tests.support.packages import installed

pytestmark = [pytest.mark.proof("4. the TensorRT backend over a recording driver, and below NVIDIA's own bindings")]

ROOT = Path(__file__).resolve().parents[5]
SOURCES = tuple(
    f"edge/backends/trt/{name}.py"
    for name in ("driver", "captured", "backend", "blocks", "conditioned_blocks", "drafter")
)
VERSIONS = ("12.9.2", "12.9.10", "13.0.3", "13.5.0")
"""First and last of each major version on the index that the package's extras admit."""

PROBE = """
import json
from cuda.bindings import driver, nvrtc
names = set(dir(driver)) | set(dir(nvrtc))
names |= {name for kind in vars(driver).values() if isinstance(kind, type) for name in dir(kind)}
names |= {name for kind in vars(nvrtc).values() if isinstance(kind, type) for name in dir(kind)}
print(json.dumps(sorted(names)))
"""
ARITY_PROBE = """
import inspect, json, sys
from cuda.bindings import driver
print(json.dumps({name: len(inspect.signature(getattr(driver, name)).parameters) for name in sys.argv[1:]}))
"""


def environment(version: str, **more: str) -> dict[str, str]:
    folder = installed(f"cuda-bindings=={version}")
    return dict(os.environ) | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"} | more


def used() -> set[str]:
    """Functions are called by name; types and their values stand behind dots."""
    texts = [(ROOT / source).read_text("utf-8") for source in SOURCES]
    found = {name for text in texts for name in re.findall(r'"(cu[A-Z]\w+)"|\.(CU\w+)', text) for name in name if name}
    return found | set(re.findall(r"nvrtc\.(\w+)", (ROOT / "edge/backends/trt/kernels/__init__.py").read_text("utf-8")))


@pytest.mark.timeout(200)
@pytest.mark.parametrize("version", VERSIONS)
def test_driver_names_that_are_used_exist(version: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment(version), capture_output=True, check=True)
    names = set(json.loads(done.stdout))
    assert {"cuLaunchKernel", "CUevent_flags", "CU_EVENT_BLOCKING_SYNC", "nvrtcGetCUBIN"} <= used()
    assert used() - names == set()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("version", VERSIONS)
def test_driver_takes_as_many_arguments_as_the_recording_one(version: str) -> None:
    """So what the recording driver lets pass is a call that the bindings take."""
    command = [sys.executable, "-c", ARITY_PROBE, *PARAMETERS]
    done = subprocess.run(command, env=environment(version), capture_output=True, check=True)
    assert json.loads(done.stdout) == PARAMETERS
    assert {name for name in used() if name.startswith("cu")} == PARAMETERS.keys()


@pytest.mark.slow
@pytest.mark.timeout(600)  # seconds on an idle machine
@pytest.mark.parametrize("version", ["12.9.10", "13.5.0"])
def test_emulated_driver_passes_the_tests_for_a_gpu(version: str, tmp_path: Path) -> None:
    """What pip gives a Jetson with JetPack 6, and one with JetPack 7. Only TensorRT itself must be skipped."""
    build_driver(tmp_path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=--import-mode=importlib",
        "-o",
        "timeout=500",
    ]
    few = ["tests/gpu", "-k", "backend_on_gpu or blocks_on_gpu or conditions_on_gpu or random or nucleus"]
    settings = environment(version, LD_LIBRARY_PATH=str(tmp_path), OMP_NUM_THREADS="1")
    done = subprocess.run([*command, *few], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[1-9]\d* passed, 3 skipped", done.stdout.splitlines()[-1]), done.stdout
