"""The allocator for a process that already lives in a pycuda context, with the real pycuda.

pycuda comes as source: it is built once against the CUDA headers that pip has, without cuRAND and GL, and kept. Below
it is the emulated libcuda; what that lacks, and nothing here calls, answers "not supported".
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from tests.support.emulator import HERE, compile_library
from tests.support.packages import PIP, cache_folder, installed

pytestmark = [
    pytest.mark.proof("4. the TensorRT backend over a recording driver, and below NVIDIA's own bindings"),
    pytest.mark.slow,
    pytest.mark.timeout(1500),  # the build takes two minutes on an idle machine, once
]

ROOT = Path(__file__).resolve().parents[5]
VERSION = "2026.1"
HEADERS = ("nvidia-cuda-runtime==13.5.37", "nvidia-cuda-profiler-api==13.5.25")
BUILD_LIMIT_S = 1200


@pytest.fixture(scope="module")
def pycuda() -> Path:
    """The folder that it is built into; skips, with the reason, where it cannot be."""
    folder = cache_folder() / f"pycuda-{VERSION}-cp{sys.version_info.major}{sys.version_info.minor}"
    if folder.is_dir():
        return folder
    includes = ",".join(f"{installed(requirement, '--no-deps')}/nvidia/cu13/include" for requirement in HEADERS)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = Path(name)
        (work / "empty.c").touch()
        subprocess.run(["cc", "-shared", "-o", work / "libcuda.so", work / "empty.c"], check=True)
        fetch = ["download", "--no-deps", "--no-binary=:all:", "--no-build-isolation", "--dest", name]
        if subprocess.run([*PIP, *fetch, f"pycuda=={VERSION}"], capture_output=True).returncode:
            pytest.skip(f"pycuda {VERSION} cannot be fetched here")
        with tarfile.open(work / f"pycuda-{VERSION}.tar.gz") as archive:
            archive.extractall(work, filter="data")
        source = work / f"pycuda-{VERSION}"
        settings = ["--no-cuda-enable-curand", f"--cuda-inc-dir={includes}", f"--cudadrv-lib-dir={work}"]
        subprocess.run([sys.executable, "configure.py", *settings], cwd=source, check=True, capture_output=True)
        # Nobody's CUDA_INC_DIR, and no nvcc of the machine: its headers may be another version's.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CUDA")} | {"PATH": "/usr/bin:/bin"}
        command = [*PIP, "install", "--no-deps", "--target", str(work / "fresh"), "."]
        done = subprocess.run(
            command, cwd=source, env=environment, capture_output=True, text=True, timeout=BUILD_LIMIT_S
        )
        if done.returncode:
            errors = re.findall(r".*error: .*", done.stderr)
            pytest.skip(f"pycuda {VERSION} cannot be built here: {(errors or ['pip gives no reason'])[0].strip()}")
        shutil.move(work / "fresh", folder)
    return folder


EMULATED = """
#include "libcuda.cpp"
extern "C" {
int cuCtxPushCurrent_v2(void* context) { return cuCtxSetCurrent(context); }
int cuCtxPopCurrent_v2(void** context) { NEED_CONTEXT; *context = current; current = nullptr; return OK; }
int cuCtxGetDevice(int* device) { NEED_CONTEXT; *device = 0; return OK; }
int cuGetErrorString(int, const char** text) { *text = "emulated error"; return OK; }
"""
GIVEN = set(re.findall(r"^int (cu\w+)\(", EMULATED + (HERE / "libcuda.cpp").read_text(), re.MULTILINE))


def libcuda(folder: Path, wanted: set[str]) -> Path:
    """The emulated driver with every function that pycuda links to, under the versioned name that it uses."""
    lines = []
    for name in sorted(wanted - GIVEN):
        plain = re.sub(r"_v\d$", "", name)
        alias = f' __attribute__((alias("{plain}")));' if plain in GIVEN else " { return 801; }"
        lines.append(f"int {name}(){alias}")
    (folder / "pycuda.cpp").write_text("\n".join([EMULATED, *lines, "}", ""]))
    library = folder / "libcuda.so.1"
    flags = ("-DTHREADS=64", f"-I{HERE}", "-Wno-attribute-alias", "-Wl,-soname,libcuda.so.1", "-ldl")
    compile_library(str(folder / "pycuda.cpp"), library, *flags)
    return library


SCRIPT = """
import ctypes, sys
import numpy as np
import pycuda
from edge.backends.trt.driver import PycudaMemory
from shared.errors import DeviceError

emulated = ctypes.CDLL("libcuda.so.1")
memory = PycudaMemory()
before = emulated.emulated_leaks()
at = memory.device(1000)
view, address = memory.mapped(64)
assert at % 256 == 0 and view.nbytes == 64 and view.dtype == np.uint8 and not view.any()
view.view(np.int32)[:] = 7
assert list((ctypes.c_int32 * 16).from_address(address)) == [7] * 16, "the device sees what the host wrote"
assert emulated.emulated_leaks() == before + 2
try:
    memory.device(0)  # a driver refuses that
except DeviceError as error:
    print(error)
del view
memory.free()
assert emulated.emulated_leaks() == before
print(pycuda.VERSION_TEXT, memory.graphs)
"""


def test_pycuda_memory_keeps_the_protocol_with_the_real_package(pycuda: Path, tmp_path: Path) -> None:
    (module,) = (pycuda / "pycuda").glob("_driver*.so")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True)
    library = libcuda(tmp_path, set(re.findall(r" U (cu[A-Z]\w+)", symbols.stdout)))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(pycuda), str(ROOT)]),
        "LD_LIBRARY_PATH": str(tmp_path),
        "LD_PRELOAD": str(library),  # built without a driver, the package does not name the library that it needs
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    refused, told = done.stdout.splitlines()
    assert refused.startswith("pycuda cannot allocate 0 MiB: cuMemAlloc failed")
    assert told == f"{VERSION} False"


def test_pycuda_without_a_driver_is_one_sentence(pycuda: Path) -> None:
    script = "from edge.backends.trt.driver import PycudaMemory\nPycudaMemory()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(pycuda), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1].startswith("shared.errors.DeviceError: pycuda finds no GPU: ")
