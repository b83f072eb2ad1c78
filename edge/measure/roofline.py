"""Roofline estimate of a step on a Jetson Orin Nano: the least time that arithmetic or memory traffic allows.

Shapes come from the manifest and the weights' size from the graph's file, since the edge imports no onnx. A test counts
the same products in the graph itself.
"""

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from edge.serving.window import tokens_per_pass
from shared.errors import ConfigError
from shared.manifest import Manifest, ModelSpec, Precision


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


PASS_ROWS: Final = (8, 16)
PASS_CACHED: Final = (64, 240)
PASS_PRECISIONS: Final[tuple[Precision, ...]] = ("fp16", "int8")


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


class PassFloor(Struct, frozen=True):
    """Of one pass by blocks over `rows` rows behind `cached` ones.

    tokens_per_s: an upper bound, of what such a pass keeps; None for more rows than the bundle drafts.
    """

    board: str
    precision: Precision
    rows: int
    cached: int
    mflop: float
    mbytes: float
    compute_ms: float
    memory_ms: float
    tokens_per_s: float | None

    @property
    def floor_ms(self) -> float:
        """The least time of a pass."""
        return max(self.compute_ms, self.memory_ms)


def pass_floors(board: str, manifest: Manifest) -> list[PassFloor]:
    """By precision, rows and cache, with the tokens that the manifest says a pass keeps. Raises ConfigError."""
    if board not in BOARDS:
        raise ConfigError(f"--roofline {board}: choose one of {', '.join(BOARDS)}")
    assert manifest.blocks is not None
    window = manifest.blocks.window
    kept = tokens_per_pass(manifest, window) or [1.0]
    sizes = [(p, r, c) for p in PASS_PRECISIONS for r in sorted({1, window + 1, *PASS_ROWS}) for c in PASS_CACHED]
    return [
        _pass_floor(board, manifest.model, precision=p, rows=r, cached=c, kept=kept[r - 1] if r <= len(kept) else None)
        for p, r, c in sizes
    ]


def _pass_floor(
    board: str, model: ModelSpec, *, precision: Precision, rows: int, cached: int, kept: float | None
) -> PassFloor:
    """Weights but the embedding's, and keys and values (FP16), are read once; the drafter is left out."""
    peak, d = BOARDS[board], model.d_model
    weights = 12 * d * d * model.layers + d * model.vocab_size
    linear, attention = 2 * rows * weights, 4 * rows * (cached + rows) * d * model.layers
    moved = weights * (1 if precision == "int8" else 2) + 2 * 2 * (cached + rows) * d * model.layers
    linear_tops = peak.int8_tops if precision == "int8" else peak.fp16_tops
    compute_ms, memory_ms = (linear / linear_tops + attention / peak.fp16_tops) / 1e9, moved / peak.bandwidth_gbs / 1e6
    tokens_per_s = None if kept is None else kept / max(compute_ms, memory_ms) * 1e3
    return PassFloor(
        board=board,
        precision=precision,
        rows=rows,
        cached=cached,
        mflop=(linear + attention) / 1e6,
        mbytes=moved / 1e6,
        compute_ms=compute_ms,
        memory_ms=memory_ms,
        tokens_per_s=tokens_per_s,
    )


def print_passes(passes: Sequence[PassFloor]) -> None:
    """The table."""
    print("a pass by blocks, without drafter and launch; tokens/s: the tokens it keeps by its floor, no more than that")
    print(f"{'graph':6} {'rows':>5} {'cached':>7} {'MFLOP':>8} {'MB':>8} {'floor, ms':>10} {'tokens/s':>9}")
    for p in passes:
        rate = "" if p.tokens_per_s is None else f"{p.tokens_per_s:9.0f}"
        shape = f"{p.precision:6} {p.rows:5} {p.cached:7}"
        print(f"{shape} {p.mflop:8.1f} {p.mbytes:8.2f} {p.floor_ms:10.4f} {rate}".rstrip())
