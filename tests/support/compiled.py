"""The compiled library in tests: where it is to be, its sets of instructions, and requests to decode with it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from edge.backends.native_rows import NativeRows, read_networks
from edge.decoding.blocks import Law, Rows, RowScores, Writing
from edge.native import Library, Request, library, why_not
from shared.manifest import read_manifest
from shared.tokens import BOS, FIRST_TEXT_ID, MASK, PAD

SHIPPED: Final = Path(__file__).parents[2] / "bundle" / "tinystories"
CONDITIONS: Final = SHIPPED.with_name("tinystories-conditions")
NEEDS_LIBRARY: Final = pytest.mark.skipif(library() is None, reason=f"the compiled library {why_not()}")
SETS: Final = ("amx", "vnni_512", "vnni_256")
LAWS: Final = (
    (0.8, 64, 1.0, 3),
    (0.0, 64, 1.0, 3),
    (0.8, 64, 0.7, 3),
    (1.3, 5, 1.0, 2),
    (0.8, 1, 1.0, 3),
    (1.0, 64, 1e-30, 1),
    (2.0, 64, 1.0, 0),
    (1e-4, 3, 0.5, 3),
)
"""Temperature, top-k, top-p and window."""


def libraries() -> list[Library]:
    """One for each set of instructions that this processor has."""
    return [found for name in SETS if (found := library(name)) is not None]


def native_rows(folder: Path, instructions: str | None = None) -> NativeRows:
    """A bundle's rows by the library, or by that for one set of instructions."""
    manifest = read_manifest(folder)
    networks, named = read_networks(folder, manifest), library(instructions)
    assert networks is not None and named is not None
    return NativeRows(folder, manifest, 1, replace(networks, library=named))


def one_pass(rows: NativeRows, asked: Sequence[Rows]) -> list[RowScores]:
    """Rows of several requests in one call of the library."""
    placed = [request for one in asked for request in one.slot.memory.place(one)]
    rows._call(rows._library.run, asked[0].slot, (Request * len(placed))(*placed))
    memories = [one.slot.memory for one in asked]
    return [RowScores(m.scores[: one.scored], m.states[: one.scored]) for m, one in zip(memories, asked, strict=True)]


def text_rows(rng: np.random.Generator, rows: NativeRows, count: int, scored: int) -> Rows:
    """The first rows of a random text, in a slot of their own."""
    tokens = rng.integers(FIRST_TEXT_ID, rows._widths["scores"], count).astype(np.int32)
    tokens[0] = BOS
    return Rows(rows.open_slot(), tokens, np.arange(count, dtype=np.int32), scored)


def writings(rows: NativeRows, *, seeds: Sequence[int], longest: int = 30) -> Iterator[Writing]:
    """Requests of every law: short and long prompts, some up to the end of the canvas, and gaps."""
    vocab, length = rows._widths["scores"], rows._manifest.model.canvas_len
    for seed in seeds:
        rng = np.random.default_rng(seed)
        temperature, top_k, top_p, window = LAWS[seed % len(LAWS)]
        canvas = rng.integers(FIRST_TEXT_ID, vocab, length).astype(np.int32)
        canvas[0], fill = BOS, np.zeros(length, bool)
        if seed % 3 == 2:
            for start in range(2, 62, 10):
                fill[start : start + int(rng.integers(1, 7))] = True
            end = length if seed % 2 else 80  # to the end of the canvas, or with room to say that the text ends
            canvas[end:] = PAD
        else:
            start = length - 9 if seed % 5 == 0 else int(rng.integers(1, 12))
            fill[start : start + longest] = True
            canvas[start + longest :] = PAD
        canvas[fill] = MASK
        law = Law(int(rng.integers(2**63)), temperature, top_k, top_p, window)
        yield Writing(canvas, fill, seed % 3 != 2, law, vocab, slot=rows.open_slot())
