"""Compares GPU and CPU: every profile of the engines, from the same canvases and behind the same texts."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from edge.decoding import blocks
from edge.decoding.blocks import BlocksLoop, ConditionedRows, Law, RowsBackend, Slot, TakesConditions, Writing
from edge.decoding.canvas import advance
from edge.decoding.conditions import Condition, Remaining
from edge.decoding.types import AnyBackend, Row, Sampling
from edge.measure.conditions import random_condition
from shared.manifest import Manifest
from shared.tokens import BOS, EOS, MASK, PAD

STEPS: Final = 5
"""Denoising steps per profile."""
TEXTS: Final = 8
TOKENS: Final = 8
"""That blocks write after each text."""
SHORT: Final = 8
"""Tokens of a text that is not to fill a profile."""
MIN_AGREEMENT: Final = 0.8
"""Of committed tokens: lower precision changes close draws only, a broken engine most of them."""
PLAIN: Final = ""
GUIDED: Final = "guidance"
GUIDANCE: Final = 0.5
"""It multiplies what precision costs, too: the error of a score by 1 + 2 · guidance at most."""
KINDS: Final = (PLAIN, "words", "pictures", GUIDED)
"""Of requests for an engine that reads conditions. A guided one has both words and pictures, and takes two slots."""


class Compared(NamedTuple):
    """The comparison of one profile: of a batch of canvases of that length, or of requests with so many rows."""

    batch: int
    length: int
    step_ms: float  # of a step or a pass, median on the GPU
    agreement: float  # of the tokens that either side committed, the share that both did
    kind: str = PLAIN  # of the requests, one of KINDS


@dataclass(frozen=True, eq=False)
class Asked:
    """A request to compare, behind the first tokens of a text."""

    kind: str
    text: list[int]
    condition: Condition | None


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
    """Each profile (slots, rows) writes greedily behind texts of the CPU's; the CPU says what it would have drawn.

    A profile of many rows reads a text that fills it; one of few passes them on. Where the engine reads conditions,
    requests of all KINDS share the passes, and each kind is judged by itself. Raises DeviceError when the GPU fails.
    """
    texts, made = [_text(cpu, manifest, seed) for seed in range(TEXTS)], list[Compared]()
    each, kinds = (2, KINDS) if isinstance(gpu, TakesConditions) else (1, KINDS[:1])  # slots of a request
    asked = [
        Asked(kind, text, _condition(kind, manifest, number))
        for number, text in enumerate(texts)
        for kind in (*kinds[number % len(kinds) :], *kinds[: number % len(kinds)])  # by turns in each slot
    ]
    counts = [max(1, slots // each) for slots, _ in profiles]
    slots = [gpu.open_slot() for _ in range(max(counts))]
    for count, (width, rows) in zip(counts, profiles, strict=True):
        fitting = asked
        if each == 2 and rows == gpu.depth + 1 and width <= 2:  # of one request: two slots only if it is guided
            fitting = [one for one in asked if (one.kind == GUIDED) == (width == 2)]
        made += _compare_blocks(gpu, cpu, manifest=manifest, slots=slots[:count], asked=fitting, rows=rows)
    return made


def _condition(kind: str, manifest: Manifest, number: int) -> Condition | None:
    """One, two, … words and pictures, by turns, up to the most that the bundle takes."""
    takes = manifest.conditions
    if kind == PLAIN or takes is None:
        return None
    return random_condition(
        takes,
        manifest.model,
        words=0 if kind == "pictures" else 1 + number % takes.words,
        pictures=0 if kind == "words" else 1 + number % takes.pictures,
        guidance=GUIDANCE if kind == GUIDED else 0.0,
        seed=number,
    )


def _compare_blocks(
    gpu: BlocksLoop,
    cpu: RowsBackend,
    *,
    manifest: Manifest,
    slots: Sequence[Slot],
    asked: Sequence[Asked],
    rows: int,
) -> list[Compared]:
    """→ one for each kind of request, in the order in which they come"""
    reads, kinds = rows > gpu.depth + 1, list(dict.fromkeys(one.kind for one in asked))
    times_ms, same, total = {kind: list[float]() for kind in kinds}, dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0)
    length = min(rows, manifest.model.canvas_len - TOKENS) if reads else SHORT
    for first in range(0, len(asked), len(slots)):
        writings = {one: _greedy(manifest, one, length, gpu.depth) for one in asked[first : first + len(slots)]}
        for (one, writing), slot in zip(writings.items(), slots, strict=True):
            writing.slot, slot.cached = slot, 0
            ms = _pass_ms(gpu, [writing])
            times_ms[one.kind] += [ms] * reads
        while open_ones := {one: writing for one, writing in writings.items() if not writing.done}:
            ms = _pass_ms(gpu, list(open_ones.values()))
            for kind in {one.kind for one in open_ones}:
                times_ms[kind] += [ms] * (not reads)
        for one, writing in writings.items():
            tokens = writing.canvas[: writing.position + 1]
            new = tokens.size - length
            if one.condition is not None:  # up to where a word is told: later rows read less
                told = Remaining(one.condition).tell([], tokens[length:].tolist())
                tokens, new = (tokens, new) if told is None else (tokens[: length + told + 1], told + 1)
            places, slot = np.arange(tokens.size - 1, dtype=np.int32), cpu.open_slot()
            if one.condition is not None:
                assert isinstance(cpu, ConditionedRows)
                cpu.load(one.condition)
                cpu.encode(slot, one.condition)
            scores = cpu.rows(slot, tokens[:-1], positions=places, scored=new)
            same[one.kind] += int(np.count_nonzero(scores.scores.argmax(1) == tokens[length:]))
            total[one.kind] += new
    return [
        Compared(len(slots), rows, statistics.median(times_ms[kind] or [0.0]), same[kind] / total[kind], kind)
        for kind in kinds
    ]


def _greedy(manifest: Manifest, asked: Asked, length: int, window: int) -> Writing:
    """TOKENS more, at most, behind the first `length` of the text."""
    canvas = np.full(length + TOKENS, MASK, np.int32)
    canvas[:length] = asked.text[:length]
    law, vocab_size = Law(0, 0.0, 1, 1.0, window), manifest.model.vocab_size
    return Writing(canvas, canvas == MASK, True, law, vocab_size, condition=asked.condition)


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
