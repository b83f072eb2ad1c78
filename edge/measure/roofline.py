"""Roofline estimate of a step on a Jetson Orin Nano: the least time that arithmetic or memory traffic allows.

Shapes come from the manifest and the weights' size from the graph's file, since the edge imports no onnx. A test counts
the same products in the graph itself.
"""

from typing import Final

from msgspec import Struct

from shared.errors import ConfigError
from shared.manifest import ModelSpec, Precision


class Board(Struct, frozen=True):
    """Peaks of one power mode: dense tensor-core rates (10¹² operations a second), bandwidth (10⁹ bytes a second)."""

    fp16_tops: float
    int8_tops: float
    bandwidth_gbs: float


BOARDS: Final = {
    "orin-nano-15w": Board(10.0, 20.0, 68.0),
    "orin-nano-25w": Board(15.0, 30.0, 102.0),
    "orin-nano-maxn": Board(17.0, 33.0, 102.0),
}


class Floor(Struct, frozen=True):
    """Of one step of `batch` canvases of full length. The larger of the two times is the floor."""

    board: str
    precision: str
    batch: int
    gflop: float
    mbytes: float
    compute_ms: float
    memory_ms: float

    @property
    def floor_ms(self) -> float:
        """The least time of a step."""
        return max(self.compute_ms, self.memory_ms)


def matmul_flops(model: ModelSpec, batch: int) -> tuple[int, int]:
    """Two per multiply-add.  → of QKV, projection, feed-forward, LM head and time; of attention, which is never INT8"""
    tokens, d = batch * model.canvas_len, model.d_model
    linear = 2 * tokens * d * (12 * d * model.layers + model.vocab_size)
    time = 4 * batch * d * d if model.time_input else 0
    return linear + time, 4 * tokens * model.canvas_len * d * model.layers


def floor(board: str, model: ModelSpec, *, precision: Precision, graph_bytes: int, batch: int) -> Floor:
    """graph_bytes: size of the CUDA graph's file. Logits are written once and read once. Raises ConfigError."""
    if board not in BOARDS:
        raise ConfigError(f"--roofline {board}: choose one of {', '.join(BOARDS)}")
    peak = BOARDS[board]
    linear, attention = matmul_flops(model, batch)
    linear_tops = peak.int8_tops if precision == "int8" else peak.fp16_tops
    moved = graph_bytes + 2 * 2 * batch * model.canvas_len * model.vocab_size
    return Floor(
        board=board,
        precision=precision,
        batch=batch,
        gflop=(linear + attention) / 1e9,
        mbytes=moved / 1e6,
        compute_ms=(linear / linear_tops + attention / peak.fp16_tops) / 1e9,
        memory_ms=moved / peak.bandwidth_gbs / 1e6,
    )
