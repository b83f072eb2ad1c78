"""The GPU of this machine; or, in a process of test_emulated_driver, the emulated one below NVIDIA's own bindings."""

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from edge.backends.trt import kernels
from edge.backends.trt.backend import TrtBackend
from edge.backends.trt.driver import CudaMemory, Gpu
from edge.backends.trt.engine_cache import Built
from edge.backends.trt.find_tensorrt import import_tensorrt
from edge.decoding.types import Row, Sampling
from host.export.random_weights import untrained
from host.model.network import CONFIGS
from shared.errors import DeviceError
from shared.manifest import Manifest, read_manifest
from shared.tokens import BOS, FIRST_TEXT_ID, MASK
from tests.conftest import Exported
from tests.gpu.standin import EMULATED, Network, StandIn

LENGTH = 64


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    """Skips where there is none. Each test closes it, or the backend that it gave it to; nothing may be left then."""
    try:
        made = Gpu()
    except DeviceError as error:
        pytest.skip(str(error))
    yield made
    if made.name == EMULATED:
        assert ctypes.CDLL("libcuda.so.1").emulated_leaks() == 0


def need_tensorrt(gpu: Gpu) -> None:
    """Close the GPU for a test that opens its own; skip the test where TensorRT cannot run."""
    emulated = gpu.name == EMULATED
    gpu.close()
    if emulated:
        pytest.skip("TensorRT needs a real GPU")
    try:
        import_tensorrt()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cubins() -> dict[str, bytes]:
    """Architecture → kernels; the emulated driver has its own."""
    return {}


@pytest.fixture
def cubin(gpu: Gpu, cubins: dict[str, bytes]) -> bytes:
    """The kernels for this GPU."""
    if gpu.name == EMULATED:
        return b"\x7fELF"
    if gpu.architecture not in cubins:
        cubins[gpu.architecture] = kernels.compile_kernels(gpu.architecture)
    return cubins[gpu.architecture]


@pytest.fixture
def manifest(exported: Exported) -> Manifest:
    """The debug bundle's, with a shorter canvas."""
    whole = read_manifest(exported.folder)
    return msgspec.structs.replace(whole, model=msgspec.structs.replace(whole.model, canvas_len=LENGTH))


@pytest.fixture
def network(gpu: Gpu) -> Network:
    """Of that shape, with random weights."""
    return Network(untrained(replace(CONFIGS["debug"], canvas_len=LENGTH))[0], gpu)


@pytest.fixture
def backend(gpu: Gpu, cubin: bytes, manifest: Manifest, network: Network) -> Iterator[TrtBackend]:
    """The real backend; torch in the engine's place."""
    trt = StandIn(gpu, network, manifest.model.vocab_size)
    made = TrtBackend(trt, gpu, memory=CudaMemory(gpu), manifest=manifest, built=Built(b"", cubin))  # type: ignore[arg-type]
    yield made
    made.close()


def rows(count: int, sampling: Sampling) -> list[Row]:
    """Canvases that begin alike, each with a seed of its own."""
    canvas = np.full(LENGTH, MASK, np.int32)
    canvas[:4] = [BOS, *range(FIRST_TEXT_ID + 6, FIRST_TEXT_ID + 9)]
    fill = canvas == MASK
    return [Row(canvas.copy(), fill, replace(sampling, seed=seed)) for seed in range(count)]
