"""Peak speed of this machine: matrix products by ONNX Runtime, in GFLOP/s; torch's are in `host.device`."""

from typing import Literal

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from host.device import PEAK_SIZE, median_s


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
