"""Compares GPU and CPU: every profile of the engine, step by step from the same canvases."""

import statistics
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from edge.backends.trt.profiles import PAIRED
from edge.decoding import blocks
from edge.decoding.blocks import BlocksLoop, Law, RowsBackend, Slot, Writing
from edge.decoding.canvas import advance
from edge.decoding.types import AnyBackend, Row, Sampling
from shared.manifest import Manifest
from shared.tokens import BOS, EOS, MASK, PAD

STEPS: Final = 5
"""Denoising steps per profile."""
TEXTS: Final = 8
TOKENS: Final = 4
"""That blocks write after each text."""
SHORT: Final = 8
"""Tokens of a text that is not to fill a profile."""
MIN_AGREEMENT: Final = 0.8
"""Of committed tokens: lower precision changes close draws only, a broken engine most of them."""


class Compared(NamedTuple):
    """The comparison of one profile: of a batch of canvases of that length, or of requests with so many rows."""

    batch: int
    length: int
    step_ms: float  # of a step or a pass, median on the GPU
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


def compare_blocks(
    gpu: BlocksLoop, cpu: RowsBackend, manifest: Manifest, profiles: Sequence[tuple[int, int]]
) -> list[Compared]:
    """Each profile (requests, rows) writes greedily behind texts of the CPU's; the CPU says what it would have drawn.

    A profile of many rows reads a text that fills it; one of few passes them on. Raises DeviceError when the GPU fails.
    """
    texts = [_text(cpu, manifest, seed) for seed in range(TEXTS)]
    each = 2 if max(profiles)[0] == PAIRED[-1] else 1  # slots of a request; of two, the second is for guidance
    counts = [max(1, requests // each) for requests, _ in profiles]
    slots, made = [gpu.open_slot() for _ in range(max(counts))], list[Compared]()
    for count, (_, rows) in zip(counts, profiles, strict=True):
        made.append(_compare_blocks(gpu, cpu, manifest=manifest, slots=slots[:count], texts=texts, rows=rows))
    return made


def _compare_blocks(
    gpu: BlocksLoop,
    cpu: RowsBackend,
    *,
    manifest: Manifest,
    slots: Sequence[Slot],
    texts: Sequence[list[int]],
    rows: int,
) -> Compared:
    reads, times_ms, same, total = rows > gpu.depth + 1, list[float](), 0, 0
    length = min(rows, manifest.model.canvas_len - TOKENS) if reads else SHORT
    for first in range(0, len(texts), len(slots)):
        writings = [_greedy(manifest, text[:length], gpu.depth) for text in texts[first : first + len(slots)]]
        for writing, slot in zip(writings, slots, strict=True):
            writing.slot, slot.cached = slot, 0
            ms = _pass_ms(gpu, [writing])
            times_ms += [ms] * reads
        while open_ones := [w for w in writings if not w.done]:
            ms = _pass_ms(gpu, open_ones)
            times_ms += [ms] * (not reads)
        for writing in writings:
            tokens = writing.canvas[: writing.position + 1]
            new = tokens.size - length
            places = np.arange(tokens.size - 1, dtype=np.int32)
            slot = cpu.open_slot()
            scores = cpu.rows(slot, tokens[:-1], positions=places, scored=new)
            same += int(np.count_nonzero(scores.scores.argmax(1) == tokens[length:]))
            total += new
    return Compared(len(slots), rows, statistics.median(times_ms or [0.0]), same / total)


def _greedy(manifest: Manifest, text: list[int], window: int) -> Writing:
    """TOKENS more, at most."""
    canvas = np.full(len(text) + TOKENS, MASK, np.int32)
    canvas[: len(text)] = text
    return Writing(canvas, canvas == MASK, True, Law(0, 0.0, 1, 1.0, window), manifest.model.vocab_size)


def _text(cpu: RowsBackend, manifest: Manifest, seed: int) -> list[int]:
    """Of the CPU's, over and over, until it is as long as a canvas."""
    model = manifest.model
    canvas = np.full(model.canvas_len, MASK, np.int32)
    canvas[0] = BOS
    law = Law(seed, 1.0, manifest.top_k, 1.0, cpu.depth)
    writing = Writing(canvas, canvas == MASK, True, law, model.vocab_size)
    writing.slot = cpu.open_slot()
    while not writing.done:
        blocks.advance(cpu, writing)
    text: list[int] = canvas[(canvas != PAD) & (canvas != EOS)].tolist()
    return (text * model.canvas_len)[: model.canvas_len]


def _pass_ms(gpu: BlocksLoop, writings: Sequence[Writing]) -> float:
    started_s = time.perf_counter()
    gpu.advance(writings)
    return (time.perf_counter() - started_s) * 1e3
