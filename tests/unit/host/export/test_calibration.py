"""What INT8 is calibrated on, and the ranges that come of it."""

import numpy as np
import pytest

from host.export.cuda_graph import cuda_graph
from host.export.cuda_qdq import RANGES, activation_ranges, linear_inputs
from host.export.random_weights import untrained
from host.export.reference import stratified, trajectories
from host.model.network import CONFIGS
from shared.tokens import BOS, FIRST_TEXT_ID, MASK

MODEL = untrained(CONFIGS["debug"])[0]


def canvas_of(masked: int) -> tuple[np.ndarray, float]:
    canvas = np.full(256, FIRST_TEXT_ID, np.int32)
    canvas[0], canvas[1 : 1 + masked] = BOS, MASK
    return canvas, masked / 255


def test_stratified_weighs_every_mask_rate_the_same() -> None:
    """However often sampling passes through each: here 200 canvases that are nearly all masked, and few others."""
    visited = [canvas_of(n) for n in (*range(55, 256), 100, 60, 50, 40, 2, 1)]
    chosen = stratified(visited, strata=4, each=6, seed=0)
    rates = np.array([np.count_nonzero(canvas == MASK) for canvas, _ in chosen]) / 255
    assert np.histogram(rates, bins=np.linspace(0, 1, 5))[0].tolist() == [6, 6, 6, 6]
    assert all(t == np.count_nonzero(canvas == MASK) / 255 for canvas, t in chosen)
    again = stratified(visited, strata=4, each=6, seed=0)
    assert all((a == b).all() for (a, _), (b, _) in zip(chosen, again, strict=True))


def test_stratified_gives_nothing_of_a_rate_never_visited() -> None:
    chosen = stratified([canvas_of(255), canvas_of(1)], strata=4, each=3, seed=0)
    assert sorted(np.count_nonzero(canvas == MASK) for canvas, _ in chosen) == [1, 1, 1, 255, 255, 255]


@pytest.mark.slow
def test_activation_ranges_stay_within_what_was_seen() -> None:
    canvases = trajectories(MODEL, np.zeros((1, 256), np.uint16), schedule="linear", seed=0, steps=8)
    ranges = activation_ranges(cuda_graph(MODEL), canvases)
    assert tuple(ranges) == RANGES
    seen = list(linear_inputs(cuda_graph(MODEL), canvases))
    for name, largest in ranges["largest"].items():
        assert largest == max(float(np.abs(values[name]).max()) for values in seen)
        assert 0 < ranges["percentile"][name] <= largest
        assert 0 < ranges["entropy"][name] <= largest * (1 + 1e-6)
        assert ranges["percentile"][name] == pytest.approx(
            np.mean([np.percentile(np.abs(values[name]), 99.99) for values in seen]), rel=1e-5
        )
