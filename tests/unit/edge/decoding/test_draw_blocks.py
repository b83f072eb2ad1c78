"""The draw of blocks takes a short way where it can: it is the law all the same, for every setting."""

import numpy as np
import pytest

from edge.decoding.blocks import Law, draw
from edge.decoding.types import Floats
from shared.tokens import FIRST_TEXT_ID

VOCAB = 96
LAWS = [(t, k, p) for t in (0, 0.3, 0.8, 1, 2) for k in (1, 2, 5, 64, VOCAB) for p in (1, 0.9, 0.5, 0.01, 1e-30)]


def sorted_draw(scores: Floats, noise: Floats, law: Law) -> int:
    """By sorting all tokens, the obvious way."""
    best = np.argsort(-scores, kind="stable")
    if law.temperature == 0:
        return int(best[0])
    scaled = scores / np.float32(law.temperature)
    best = best[: law.top_k]
    p = np.exp(scaled[best] - scaled[best[0]])
    p /= p.sum()
    best = best[np.cumsum(p) - p < law.top_p]
    return int(max(sorted(best.tolist()), key=lambda token: scaled[token] + noise[token]))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), LAWS)
def test_draw_is_that_of_sorted_tokens(temperature: float, top_k: int, top_p: float) -> None:
    rng, law = np.random.default_rng(0), Law(0, temperature, top_k, top_p, 0)
    for spread in (0.5, 3.0):
        scores = rng.normal(0, spread, (60, VOCAB)).astype(np.float32)
        scores[::2] = np.round(scores[::2])  # ties
        scores[:, :FIRST_TEXT_ID] = -1e4
        noise = rng.gumbel(size=scores.shape).astype(np.float32)
        noise[::3] = np.round(noise[::3])
        wanted = [sorted_draw(*row, law) for row in zip(scores, noise, strict=True)]
        assert draw(scores, noise, law).tolist() == wanted
        assert [int(draw(scores[i : i + 1], noise[i : i + 1], law)[0]) for i in range(60)] == wanted


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_draw_refuses_scores_that_are_not_numbers(temperature: float, bad: float) -> None:
    scores = np.zeros((3, VOCAB), np.float32)
    scores[1, 50] = bad
    with pytest.raises(RuntimeError, match="not numbers"):
        draw(scores, np.zeros_like(scores), Law(0, temperature, 64, 1.0, 0))
