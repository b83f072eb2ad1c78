"""The kernels on a real GPU, alone and in a captured graph, against the very same kernels on the processor."""

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.backends.trt import kernels
from edge.backends.trt.driver import CudaMemory, Gpu
from edge.decoding.types import Row
from tests.support.emulator import Emulator
from tests.unit.edge.backends.trt.test_kernels import RULES, Device, network, some_canvas

pytestmark = pytest.mark.proof("7. kernels, captured loop and backend on a GPU")


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_kernels_on_gpu_choose_the_tokens_of_the_cpu(
    gpu: Gpu, cubin: bytes, emulator: Emulator, rule: str, captured: bool
) -> None:
    length, vocab = 64, 2048
    canvas, fill = some_canvas(1, length)
    row = Row(canvas, fill, replace(RULES[rule], seed=11))
    logits = network("usual", 1, length, vocab)
    wanted = Device(row)
    wanted.draw(emulator, logits)
    wanted.commit(emulator)
    found = on_gpu(gpu, cubin, Device(row), logits, captured)
    gpu.close()
    np.testing.assert_array_equal(found.canvas, wanted.canvas)
    np.testing.assert_array_equal(found.rows, wanted.rows)


def on_gpu(gpu: Gpu, cubin: bytes, device: Device, logits: NDArray[np.float16], captured: bool) -> Device:
    """One pass, everything in mapped memory; the arrays of `device` hold the result."""
    call, memory = gpu.call, CudaMemory(gpu)
    stream = call("cuStreamCreate", gpu.driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
    module = call("cuModuleLoadData", cubin)
    at: dict[str, int] = {}
    views: dict[str, NDArray[Any]] = {}
    held = {name: getattr(device, name) for name in ("canvas", "fill", "rows", "ratios", "candidates", "t")}
    for name, array in (held | {"logits": logits}).items():
        view, at[name] = memory.mapped(array.nbytes)
        views[name] = view.view(array.dtype).reshape(array.shape)
        views[name][...] = array
    b, length = device.canvas.shape

    def launch(name: str, grid: tuple[int, int], pointers: list[str], numbers: tuple[int, ...]) -> None:
        kernel = call("cuModuleGetFunction", module, name.encode())
        kinds = (ctypes.c_void_p,) * len(pointers) + (ctypes.c_int,) * len(numbers)
        arguments = ((*(at[p] for p in pointers), *numbers), kinds)
        call("cuLaunchKernel", kernel, *grid, 1, kernels.THREADS, 1, 1, 0, stream, arguments, 0)

    if captured:
        call("cuStreamBeginCapture", stream, gpu.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
    drawing = ["logits", "canvas", "fill", "rows", "candidates"]
    launch(kernels.DRAW, (length, b), drawing, (length, logits.shape[-1]))
    committing = ["canvas", "fill", "rows", "ratios", "candidates", "t"]
    launch(kernels.COMMIT, (b, 1), committing, (length, device.ratios.shape[1], length, 0))
    if captured:
        graph = call("cuStreamEndCapture", stream)
        executable = call("cuGraphInstantiate", graph, 0)
        call("cuGraphLaunch", executable, stream)
    call("cuStreamSynchronize", stream)
    if captured:
        call("cuGraphExecDestroy", executable)
        call("cuGraphDestroy", graph)
    for name, array in held.items():
        array[...] = views[name]
    views.clear()
    call("cuModuleUnload", module)
    call("cuStreamDestroy", stream)
    memory.free()
    return device
