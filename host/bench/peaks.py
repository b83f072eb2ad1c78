"""Peak speed of this machine: matrix products by torch and by ONNX Runtime, in GFLOP/s."""

import statistics
import time
from collections.abc import Callable
from typing import Final, Literal

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

PEAK_SIZE: Final = 1024
PEAK_SIZE_CUDA: Final = 8192  # smaller products leave a data-centre GPU idle
REPEATS: Final = 15
WARM_UP: Final = 3


def median_s(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median seconds of a call, after a few to warm up."""
    times = []
    for _ in range(WARM_UP + repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:])


def wait_for(device: torch.device) -> None:
    """Return when a GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def torch_gflops(device: torch.device, dtype: torch.dtype, repeats: int = REPEATS) -> float:
    """Torch's own peak: a square product."""
    n = PEAK_SIZE_CUDA if device.type == "cuda" else PEAK_SIZE
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    wait_for(device)

    def product() -> None:
        a @ b
        wait_for(device)

    return 2 * n**3 / median_s(product, repeats) / 1e9


def onnxruntime_gflops(kind: Literal["fp32", "int8"], threads: int) -> float:
    """ONNX Runtime's own peak: a 1024-cubed product with constant, prepacked weights; u8 × s8 → s32 for "int8"."""
    rng = np.random.default_rng(0)
    shape = (PEAK_SIZE, PEAK_SIZE)
    if kind == "fp32":
        a, b = rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)
        op, sort_in, sort_out = "MatMul", TensorProto.FLOAT, TensorProto.FLOAT
    else:
        a, b = rng.integers(0, 255, shape, np.uint8), rng.integers(-63, 63, shape, np.int8)
        op, sort_in, sort_out = "MatMulInteger", TensorProto.UINT8, TensorProto.INT32
    graph = helper.make_graph(
        [helper.make_node(op, ["a", "b"], ["y"])],
        "peak",
        [helper.make_tensor_value_info("a", sort_in, shape)],
        [helper.make_tensor_value_info("y", sort_out, shape)],
        [numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return 2 * PEAK_SIZE**3 / median_s(lambda: session.run(["y"], {"a": a})) / 1e9
