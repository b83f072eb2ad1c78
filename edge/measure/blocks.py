"""How fast a bundle writes by blocks here: what a pass costs by its rows, and whole texts with and without drafts."""

import statistics
import time
from typing import Final

import numpy as np
from msgspec import Struct

from edge.decoding.blocks import Law, RowsBackend
from edge.serving.loaded_bundle import LoadedBundle
from shared.messages import GenerateRequest
from shared.tokens import FIRST_TEXT_ID

ROWS: Final = (1, 2, 4, 8, 16)
REPEATS: Final = 40
TEXTS: Final = 10


class Pass(Struct):
    """A pass over so many rows behind half a canvas of kept ones, at most four of them scored; median."""

    rows: int
    ms: float


class Drafting(Struct):
    """Whole texts with at most `window` drafts a pass; medians over texts, which are the same with every window."""

    window: int
    tokens_per_s: float
    tokens_per_pass: float
    first_token_ms: float


class Blocks(Struct):
    """draft_ms: all drafts of one pass; None without a drafter. On a GPU a pass holds them, and `passes` is empty."""

    passes: list[Pass]
    draft_ms: float | None
    texts: list[Drafting]


def measure_blocks(loaded: LoadedBundle) -> Blocks | None:
    """None where the bundle, or the device, does not decode by blocks."""
    rows, blocks = loaded.rows, loaded.manifest.blocks
    if rows is None or blocks is None:
        return None
    passes = pass_costs(rows, loaded.manifest.model.canvas_len) if isinstance(rows, RowsBackend) else []
    draft_ms = draft_cost(loaded, rows) if isinstance(rows, RowsBackend) and rows.depth else None
    windows = sorted({0, 1, rows.depth}) if rows.depth else [0]
    return Blocks(passes, draft_ms, drafting(loaded, windows))


def pass_costs(rows: RowsBackend, canvas_len: int) -> list[Pass]:
    """Interleaved, so that a disturbance affects all sizes alike."""
    slot, times = rows.open_slot(), {n: list[float]() for n in ROWS}
    slot.cached = kept = canvas_len // 2
    slot.positions[:kept] = np.arange(kept)
    for _ in range(REPEATS):
        for n in ROWS:
            tokens, places = np.full(n, FIRST_TEXT_ID, np.int32), np.arange(kept, kept + n, dtype=np.int32)
            started = time.perf_counter()
            rows.rows(slot, tokens, positions=places, scored=min(n, 4))
            times[n].append((time.perf_counter() - started) * 1e3)
    return [Pass(n, statistics.median(times[n])) for n in ROWS]


def draft_cost(loaded: LoadedBundle, rows: RowsBackend) -> float:
    """Median time of one call of the drafter, in milliseconds."""
    model = loaded.manifest.model
    law = Law(seed=0, temperature=1.0, top_k=loaded.manifest.top_k, top_p=1.0, window=rows.depth)
    state, noise = np.zeros(model.d_model, np.float32), np.zeros((rows.depth, model.vocab_size), np.float32)
    slot, times = rows.open_slot(), []
    for _ in range(REPEATS):
        started = time.perf_counter()
        rows.draft(slot, state, token=FIRST_TEXT_ID, noise=noise, law=law)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def drafting(loaded: LoadedBundle, windows: list[int]) -> list[Drafting]:
    """The same texts with each window, interleaved."""
    figures: dict[int, list[tuple[float, float, float]]] = {window: [] for window in windows}
    for seed in range(TEXTS):
        for window in windows:
            request = GenerateRequest(prompt="Once upon a time", seed=seed, window=window)
            first_s = 0.0
            started = time.perf_counter()

            def on_step(snapshot: object, started: float = started) -> None:
                nonlocal first_s
                first_s = first_s or time.perf_counter() - started

            completion = loaded.run(loaded.prepare(request), on_step)
            seconds = time.perf_counter() - started
            tokens = completion.generated_tokens
            figures[window].append((tokens / seconds, tokens / completion.steps, first_s * 1e3))
    return [
        Drafting(window, *(statistics.median(column) for column in zip(*rows, strict=True)))
        for window, rows in figures.items()
    ]


def print_blocks(blocks: Blocks) -> None:
    """The tables."""
    print("\nblocks, a pass by its rows")
    for p in blocks.passes:
        print(f"{p.rows:6} {p.ms:8.2f} ms {p.ms / blocks.passes[0].ms:6.2f} × one row")
    if blocks.draft_ms is not None:
        print(f"drafts {blocks.draft_ms:8.2f} ms {blocks.draft_ms / blocks.passes[0].ms:6.2f} × one row")
    print(f"{'window':>6} {'tokens/s':>9} {'tokens a pass':>14} {'first token, ms':>16}")
    for d in blocks.texts:
        print(f"{d.window:6} {d.tokens_per_s:9.0f} {d.tokens_per_pass:14.2f} {d.first_token_ms:16.1f}")
