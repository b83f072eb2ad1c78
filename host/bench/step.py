"""The cost of a denoising step in torch, beside this machine's peaks: what `edge.bench` compares with."""

import msgspec
import torch

from host.bench.peaks import onnxruntime_gflops
from host.device import median_s
from host.model.network import Denoiser, ModelConfig, ends_impossible
from shared.tokens import BOS, FIRST_TEXT_ID, MASK


class StepSpeed(msgspec.Struct, frozen=True):
    """torch_ms: median of a step. gflop: matmul work of the CPU graph's step. Peaks: a square product, 10⁹ op/s."""

    torch_ms: float
    gflop: float
    fp32_gflops: float
    int8_gflops: float


def measure_step(config: ModelConfig, threads: int) -> StepSpeed:
    """Measure one shape on `threads` threads; takes a few seconds. Sets torch's number of threads."""
    return StepSpeed(
        torch_ms=torch_step_ms(config, threads),
        gflop=step_gflop(config),
        fp32_gflops=onnxruntime_gflops("fp32", threads),
        int8_gflops=onnxruntime_gflops("int8", threads),
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

    return 1e3 * median_s(step)


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
