"""With an ideal denoiser and one token a pass, sampling reproduces the distribution: texts and their lengths."""

import numpy as np
import pytest

from edge.decoding.types import Row, Sampling
from shared.manifest import Selection
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD
from tests.support.ideal import LENGTHS, PAIRS, VOCAB, Ideal
from tests.support.networks import unmask

DRAWS = 3000
CHI_SQUARE_P001 = {3: 16.27, 4: 18.47}
"""Exceeded by chance once in a thousand, by degrees of freedom; seeds are fixed, so a pass stays a pass."""


def sampled(ideal: Ideal, seed: int, steps: int, selection: Selection = "random") -> tuple[int, ...]:
    canvas = np.full(ideal.canvases.shape[1], MASK, np.int32)
    canvas[0] = BOS
    sampling = Sampling(seed=seed, steps=steps, selection=selection, temperature=1.0, top_k=VOCAB, top_p=1.0)
    unmask(ideal, "linear", Row(canvas, canvas == MASK, sampling))
    return tuple(canvas.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("ideal", [PAIRS, LENGTHS], ids=["two tokens", "with lengths"])
def test_canvases_appear_as_often_as_they_should(ideal: Ideal) -> None:
    counts = dict.fromkeys(map(tuple, ideal.canvases.tolist()), 0)
    for seed in range(DRAWS):
        counts[sampled(ideal, seed, steps=64)] += 1  # a canvas of probability 0 would be a KeyError
    expected = ideal.p * DRAWS
    chi_square = float(((np.array(list(counts.values())) - expected) ** 2 / expected).sum())
    print(f"chi-square {chi_square:.2f} over {len(counts)} canvases")
    assert chi_square < CHI_SQUARE_P001[len(counts) - 1]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_tokens_drawn_together_still_make_a_whole_story(steps: int) -> None:
    """Drawn in one pass, an end and a later word do not know of each other; the canvas must be sound all the same."""
    for seed in range(300):
        canvas = np.array(sampled(LENGTHS, seed, steps))
        assert not np.isin(canvas[1:], [MASK, BOS]).any()
        ends = np.flatnonzero(canvas < FIRST_TEXT_ID)[1:]
        if ends.size:
            assert canvas[ends[0]] == EOS
            assert (canvas[ends[0] + 1 :] == PAD).all()
