"""What a step costs in torch, and what this machine could do at best: what `edge.bench` compares with."""

import statistics
import time
from collections.abc import Callable
from typing import Final, Literal

import msgspec
import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from host.model.network import Denoiser, ModelConfig, ends_impossible
from shared.tokens import BOS, FIRST_TEXT_ID, MASK

PEAK_SIZE: Final = 1024
REPEATS: Final = 15
WARM_UP: Final = 3


class StepSpeed(msgspec.Struct, frozen=True):
    """torch_ms: median of a step. gflop: matmul work of our step. The peaks are of one square product, in 10⁹ op/s."""

    torch_ms: float
    gflop: float
    fp32_gflops: float
    int8_gflops: float


def measure_step(config: ModelConfig, threads: int) -> StepSpeed:
    """Measure one shape on `threads` threads; takes a few seconds. Sets torch's number of threads."""
    return StepSpeed(
        torch_ms=torch_step_ms(config, threads),
        gflop=step_gflop(config),
        fp32_gflops=matmul_gflops("fp32", threads),
        int8_gflops=matmul_gflops("int8", threads),
    )


def torch_step_ms(config: ModelConfig, threads: int) -> float:
    """Median eager float32 step: one canvas, every second position masked, and only those scored."""
    torch.set_num_threads(threads)
    model = Denoiser(config).eval()
    canvas = torch.arange(config.canvas_len) % (config.vocab_size - FIRST_TEXT_ID) + FIRST_TEXT_ID
    canvas[::2], canvas[0] = MASK, BOS
    canvas, t = canvas[None], torch.tensor([0.5]) if config.time_input else None
    masked = canvas == MASK

    @torch.inference_mode()
    def step() -> None:
        model.logits(model.score_canvas(canvas, t)[masked], ends_impossible(canvas)[masked])

    return _median_ms(step)


def step_gflop(config: ModelConfig) -> float:
    """10⁹ multiplications and additions of the CPU graph's matrix products, one canvas with half of it masked.

    A block's QKV product holds 3·D² weights and its other linear layers 9·D², its attention has two products of
    L × L × D; a weight costs two operations a position. From the last attention's queries on only masked positions are
    computed.
    """
    length, d = config.canvas_len, config.d_model
    block = 2 * length * 12 * d * d + 2 * 2 * length * length * d
    last = 2 * (1 + 9) * d * d + 2 * 2 * length * d
    unmasked = length // 2
    return (config.layers * block - unmasked * last + 2 * (length - unmasked) * d * config.vocab_size) / 1e9


def matmul_gflops(kind: Literal["fp32", "int8"], threads: int) -> float:
    """ONNX Runtime's own peak: a 1024-cubed product with constant, prepacked weights; u8 × s8 → s32 for "int8"."""
    import onnxruntime as ort

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
    return 2 * PEAK_SIZE**3 / _median_ms(lambda: session.run(["y"], {"a": a})) / 1e6


def _median_ms(run: Callable[[], object]) -> float:
    times = []
    for _ in range(WARM_UP + REPEATS):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[WARM_UP:])
