"""Compares GPU and CPU: every profile of the engine, step by step from the same canvases."""

import statistics
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from edge.decoding.canvas import advance
from edge.decoding.types import AnyBackend, Row, Sampling
from shared.manifest import Manifest
from shared.tokens import BOS, EOS, MASK, PAD

STEPS: Final = 5
"""Denoising steps per profile."""
MIN_AGREEMENT: Final = 0.8
"""Of committed tokens: lower precision changes close draws only, a broken engine most of them."""


class Compared(NamedTuple):
    """The comparison of one profile."""

    batch: int
    length: int
    step_ms: float  # median on the GPU
    agreement: float  # of the tokens that either side committed, the share that both did


def compare_profiles(
    gpu: AnyBackend, cpu: AnyBackend, manifest: Manifest, profiles: Sequence[tuple[int, int]]
) -> list[Compared]:
    """Run each profile (batch, length) on both. Raises DeviceError when the GPU fails."""
    return [_compare(gpu, cpu, manifest, [open_row(manifest, length, i) for i in range(b)]) for b, length in profiles]


def _compare(gpu: AnyBackend, cpu: AnyBackend, manifest: Manifest, rows: list[Row]) -> Compared:
    times_ms, same, either = [], 0, 0
    for _ in range(STEPS):
        twins = [Row(row.canvas.copy(), row.fill, row.sampling, row.step) for row in rows]
        before = np.stack([row.canvas for row in rows])
        times_ms.append(step_ms(gpu, manifest, twins))
        step_ms(cpu, manifest, rows)
        on_cpu, on_gpu = (np.stack([row.canvas for row in side]) for side in (rows, twins))
        committed = (before == MASK) & ((on_cpu != MASK) | (on_gpu != MASK))
        same += int(np.count_nonzero(committed & (on_cpu == on_gpu)))
        either += int(np.count_nonzero(committed))
    return Compared(len(rows), rows[0].active, statistics.median(times_ms), same / either)


def open_row(manifest: Manifest, length: int, seed: int) -> Row:
    """A canvas with all positions open but an end at the last position of that length."""
    canvas = np.full(manifest.model.canvas_len, PAD, np.int32)
    canvas[:length] = MASK
    canvas[0] = BOS
    if length < canvas.size:
        canvas[length - 1] = EOS
    # Twice the steps: none of those compared is the last, which would commit all that is left.
    return Row(canvas, canvas == MASK, Sampling(seed, 2 * STEPS, "confidence", 1.0, manifest.top_k, 1.0))


def step_ms(backend: AnyBackend, manifest: Manifest, rows: Sequence[Row]) -> float:
    """How long one denoising step takes."""
    started_s = time.perf_counter()
    advance(backend, manifest.schedule, rows)
    return (time.perf_counter() - started_s) * 1e3
