"""Tokens are drawn as often as they should be: chi-square tests with fixed seeds."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.decoding.canvas import draw
from edge.decoding.types import Sampling
from shared.tokens import FIRST_TEXT_ID
from tests.support.networks import Constant, filled, open_canvas

PLAIN = Sampling(seed=0, steps=1, selection="random", temperature=1.0, top_k=16, top_p=1.0)


def chi_square_limit(df: int) -> float:
    """Exceeded by chance once in a thousand (Wilson and Hilferty); seeds are fixed, so a pass stays a pass."""
    return float(df * (1 - 2 / (9 * df) + 3.09 * (2 / (9 * df)) ** 0.5) ** 3)


def truncated_softmax(logp: NDArray[np.float32], s: Sampling) -> NDArray[np.float64]:
    """What draws must follow, said once more and slowly: temperature over the top K, then top-p, renormalised."""
    p = np.exp(logp[: s.top_k].astype(np.float64) / s.temperature)
    p /= p.sum()
    kept = 0
    while kept == 0 or p[:kept].sum() < s.top_p - 1e-9:
        kept += 1
        if kept == p.size:
            break
    p[kept:] = 0
    return np.pad(p / p.sum(), (0, logp.size - p.size))


DISTRIBUTIONS = {
    "temperature 1": PLAIN,
    "temperature 0.7": replace(PLAIN, temperature=0.7),
    "temperature 1.5": replace(PLAIN, temperature=1.5),
    "top-k": replace(PLAIN, top_k=5),
    "top-p": replace(PLAIN, top_p=0.8),
    "all at once": replace(PLAIN, temperature=1.5, top_k=9, top_p=0.7),
    "over eight passes": replace(PLAIN, steps=8),
}


@pytest.mark.parametrize("seed", [1, 2**40])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_tokens_are_drawn_as_often_as_the_renormalised_top_k_says(name: str, seed: int) -> None:
    sampling = replace(DISTRIBUTIONS[name], seed=seed)
    k, draws = 16, 12_000
    logp = -np.sort(np.random.default_rng(3).gamma(2.0, 1.5, k)).astype(np.float32)
    logp -= np.log(np.exp(logp).sum() / 0.9)  # the full vocabulary holds a tenth more
    ids = np.random.default_rng(4).permutation(np.arange(FIRST_TEXT_ID, 400))[:k].astype(np.int32)
    canvas, _ = filled(Constant(ids, logp), open_canvas(draws + 1), sampling)
    counts = np.array([(canvas[1:] == i).sum() for i in ids])
    expected = truncated_softmax(logp, sampling) * draws
    assert counts[expected == 0].sum() == 0
    assert counts.sum() == draws
    likely = expected >= 5  # chi-square's own condition; the rest is counted as one
    found = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum())
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    chi_square = float(((found - wanted) ** 2 / wanted).sum())
    print(f"chi-square {chi_square:.1f} over {wanted.size} cells")
    assert chi_square < chi_square_limit(wanted.size - 1)


def test_draws_of_one_position_over_many_seeds_follow_the_softmax() -> None:
    """Another seed must be another draw, not only another position."""
    ids, p = np.array([[9, 5, 6]], np.int32), np.array([0.5, 0.3, 0.2])
    logp = np.log(p)[None].astype(np.float32)
    drawn = [
        int(draw(ids, logp, sampling=replace(PLAIN, seed=s), step=0, position=np.array([4]))[0][0]) for s in range(2000)
    ]
    wanted = p * 2000
    counts = np.array([drawn.count(i) for i in (9, 5, 6)])
    assert float(((counts - wanted) ** 2 / wanted).sum()) < chi_square_limit(2)
