"""What words and pictures cost: their encoder once a request, and each pass of rows that read what it made."""

import statistics
import time
from typing import Final

import numpy as np
from msgspec import Struct

from edge.decoding.blocks import ConditionedRows, Slot
from edge.decoding.conditions import Condition
from edge.measure.blocks import REPEATS
from edge.serving.loaded_bundle import LoadedBundle
from shared.conditions import Conditions
from shared.errors import ConfigError
from shared.manifest import ModelSpec
from shared.tokens import FIRST_TEXT_ID

KINDS: Final = ("words", "images")
ROWS: Final = (1, 2, 4)
GUIDANCE: Final = 1.0
ROUNDS: Final = 5


class Pass(Struct):
    """A pass of so many rows, all scored, behind half a canvas: least of five medians. The others over the first."""

    rows: int
    ms: float
    conditioned: float
    guided: float


class ConditionCost(Struct):
    """kind: "words" or "images", as many as the bundle takes. load_ms: of opening and trying the graphs, the guided one
    too, once in a daemon's life. encode_ms: of a request, median.
    """

    kind: str
    load_ms: float
    encode_ms: float
    passes: list[Pass]


def measure_condition(loaded: LoadedBundle, kind: str) -> ConditionCost:
    """Raises ConfigError where the bundle, or the device, takes no conditions."""
    rows, takes, model = loaded.rows, loaded.manifest.conditions, loaded.manifest.model
    if takes is None or not isinstance(rows, ConditionedRows):
        raise ConfigError(f"{loaded.model} takes neither words nor pictures on the backend {loaded.backend_name}")
    plain, guided = (most_of(kind, takes, model, guidance) for guidance in (0.0, GUIDANCE))
    started = time.perf_counter()
    for condition in (plain, guided):
        rows.load(condition)
    load_ms = (time.perf_counter() - started) * 1e3
    slots = [filled_slot(rows, condition, model.canvas_len // 2) for condition in (None, plain, guided)]
    return ConditionCost(kind, load_ms, encode_cost(rows, plain), [pass_cost(rows, slots, n) for n in ROWS])


def most_of(kind: str, takes: Conditions, model: ModelSpec, guidance: float) -> Condition:
    """As many words, or as many pictures, as a bundle takes."""
    words, pictures = (takes.words, 0) if kind == "words" else (0, takes.pictures)
    return random_condition(takes, model, words=words, pictures=pictures, guidance=guidance)


def random_condition(
    takes: Conditions, model: ModelSpec, *, words: int, pictures: int, guidance: float, seed: int = 0
) -> Condition:
    """So many words, of two random tokens each, and so many pictures of noise."""
    draw, side = np.random.default_rng(seed), takes.picture_size
    tokens = draw.integers(FIRST_TEXT_ID, model.vocab_size, (words, min(2, takes.word_tokens))).tolist()
    pixels = draw.integers(0, 256, (pictures, side, side, 3)).astype(np.uint8)
    return Condition(tuple(map(tuple, tokens)), pixels, guidance)


def filled_slot(rows: ConditionedRows, condition: Condition | None, kept: int) -> Slot:
    """A slot with so many kept rows."""
    slot = rows.open_slot()
    if condition is not None:
        rows.encode(slot, condition)
    slot.cached, slot.positions[:kept] = kept, np.arange(kept)
    return slot


def encode_cost(rows: ConditionedRows, condition: Condition) -> float:
    """Median of a request's encoding, in milliseconds."""
    slot, times = rows.open_slot(), []
    for _ in range(REPEATS):
        started = time.perf_counter()
        rows.encode(slot, condition)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def pass_cost(rows: ConditionedRows, slots: list[Slot], n: int) -> Pass:
    """Interleaved, so that a disturbance affects all kinds alike."""
    first = slots[0].cached
    tokens, places = np.full(n, FIRST_TEXT_ID, np.int32), np.arange(first, first + n, dtype=np.int32)
    medians: list[list[float]] = []
    for _ in range(ROUNDS):
        times: list[list[float]] = [[] for _ in slots]
        for _ in range(REPEATS):
            for slot, spent in zip(slots, times, strict=True):
                started = time.perf_counter()
                rows.rows(slot, tokens, positions=places, scored=n)
                spent.append((time.perf_counter() - started) * 1e3)
        medians.append([statistics.median(spent) for spent in times])
    plain, conditioned, guided = (min(column) for column in zip(*medians, strict=True))
    return Pass(n, plain, conditioned / plain, guided / plain)


def print_condition(cost: ConditionCost) -> None:
    """The table."""
    print(f"{cost.kind}: graphs loaded in {cost.load_ms:.0f} ms, once; encoded in {cost.encode_ms:.2f} ms a request")
    print(f"{'rows':>6} {'a pass, ms':>11} {'conditioned':>12} {'guided':>8}")
    for p in cost.passes:
        print(f"{p.rows:6} {p.ms:11.2f} {p.conditioned:11.2f}× {p.guided:7.2f}×")
