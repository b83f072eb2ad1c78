"""The law of blocks on a network that can be enumerated: transitions of a million tokens for each setting."""

import itertools
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.decoding.blocks import Law, RowScores, Slot, Writing, advance, draw
from edge.decoding.philox import block_noise
from edge.decoding.types import Floats, Ids
from shared.tokens import BOS, FIRST_TEXT_ID, MASK
from tests.unit.edge.decoding.test_draw_frequencies import chi_square_limit

VOCAB: Final = 14
SEEDS: Final = 250
LENGTH: Final = 4000
SETTINGS: Final = list(itertools.product((0.5, 0.8, 1.0, 1.5), (VOCAB, 4), (1.0, 0.8, 0.3)))


def table(seed: int) -> Floats:
    """Scores of the token after each token: the network sees one token and writes text alone."""
    scores = np.random.default_rng(seed).normal(0, 1.2, (VOCAB, VOCAB)).astype(np.float32)
    scores[:, :FIRST_TEXT_ID] = -1e4
    return scores


SCORES: Final = table(0)


def enumerated(scores: Floats, temperature: float, top_k: int, top_p: float) -> NDArray[np.float64]:
    """The law of the next token, said slowly: temperature, the best top_k, of these the fewest that reach top_p."""
    best = sorted(range(VOCAB), key=lambda token: (-scores[token], token))[:top_k]
    p = np.exp(np.array([float(scores[token]) for token in best]) / temperature)
    p /= p.sum()
    kept = next(n for n in range(1, len(best) + 1) if n == len(best) or p[:n].sum() >= top_p)
    law = np.zeros(VOCAB)
    law[best[:kept]] = p[:kept] / p[:kept].sum()
    return law


def walk(noise: Floats, law: Law) -> Ids:
    """Texts of many seeds at once, from BOS.  noise (seeds, positions, V) → (seeds, 1 + positions)"""
    texts = np.full((noise.shape[0], 1 + noise.shape[1]), BOS, np.int32)
    for position in range(noise.shape[1]):
        texts[:, position + 1] = draw(SCORES[texts[:, position]], noise[:, position], law)
    return texts


@pytest.fixture(scope="module")
def noise() -> Floats:
    """Of every seed's positions, as the loop has it."""
    positions = np.arange(1, LENGTH + 1, dtype=np.uint32)
    return np.stack([block_noise(seed, positions, VOCAB) for seed in range(SEEDS)])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_law_of_a_million_tokens_is_the_enumerated_one(
    noise: Floats, temperature: float, top_k: int, top_p: float
) -> None:
    texts = walk(noise, Law(0, temperature, top_k, top_p, 0))
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, (texts[:, :-1].ravel(), texts[:, 1:].ravel()), 1)
    assert counts.sum() == SEEDS * LENGTH == 1_000_000
    chi_square, cells = 0.0, 0
    for before, found in enumerate(counts):
        expected = enumerated(SCORES[before], temperature, top_k, top_p) * found.sum()
        assert found[expected == 0].sum() == 0
        often = expected >= 5
        found, expected = (
            np.append(found[often], found[~often].sum()),
            np.append(expected[often], expected[~often].sum()),
        )
        found, expected = found[expected > 0], expected[expected > 0]
        chi_square += float(((found - expected) ** 2 / expected).sum())
        cells += max(0, expected.size - 1)
    print(f"chi-square {chi_square:.1f}, {cells} degrees of freedom")
    assert chi_square < chi_square_limit(cells) if cells else chi_square < 1e-9


class Table:
    """The network as a backend; its drafter has another table, so that drafts are often wrong."""

    depth, lanes, fills_gaps = 3, 1, False

    def open_slot(self) -> Slot:
        return Slot(np.zeros(2 * LENGTH, np.int32), None)

    def prefill(self, slot: Slot, tokens: Ids, positions: Ids) -> None:
        raise AssertionError("without gaps nothing is read as evidence")

    def rows(self, slot: Slot, tokens: Ids, *, positions: Ids, scored: int, under_way: int = 1) -> RowScores:
        return RowScores(SCORES[tokens[-scored:]], np.zeros((scored, 1), np.float32))

    def draft(self, slot: Slot, state: Floats, *, token: int, noise: Floats, law: Law) -> Ids:
        drafts, scores = [token], (SCORES + table(1)) / np.float32(2)
        for depth in range(self.depth):
            drafts.append(int(draw(scores[drafts[-1:]], noise[depth : depth + 1], law)[0]))
        return np.array(drafts[1:], np.int32)

    def close(self) -> None:
        """Nothing to free."""


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS[::5])
def test_loop_writes_the_text_of_one_token_after_another(
    temperature: float, top_k: int, top_p: float, window: int
) -> None:
    length, passes = 120, 0
    for seed in range(5):
        law = Law(seed, temperature, top_k, top_p, window)
        canvas: NDArray[Any] = np.full(length, MASK, np.int32)
        canvas[0] = BOS
        writing, backend = Writing(canvas, canvas == MASK, True, law, VOCAB), Table()
        writing.slot = backend.open_slot()
        while not writing.done:
            advance(backend, writing)
        positions = np.arange(1, length, dtype=np.uint32)
        assert np.array_equal(writing.canvas, walk(block_noise(seed, positions, VOCAB)[None], law)[0])
        passes += writing.passes
    assert passes == 5 * (length - 1) if window == 0 else passes < 5 * (length - 1)
