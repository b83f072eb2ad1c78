"""How much probability sampling loses because the step graph gives only the K best tokens."""

import numpy as np
import pytest
import torch

from host.export.parity import dropped_mass
from host.model.network import Denoiser, config_named, ends_impossible
from shared.tokens import BOS, FIRST_TEXT_ID, MASK

CANVAS = np.array([BOS, MASK, MASK, FIRST_TEXT_ID, MASK, MASK], np.int32)


@pytest.fixture(scope="module")
def model() -> Denoiser:
    torch.manual_seed(0)
    model = Denoiser(config_named("debug")).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # decided enough that temperature matters
    return model


def test_dropped_mass_is_the_tail_of_the_sorted_softmax(model: Denoiser) -> None:
    """By hand: masked positions only, the sum behind the K-th best probability."""
    row = torch.from_numpy(CANVAS).long()[None]
    with torch.no_grad():
        logits = model.logits(model.score_canvas(row, torch.tensor([0.8]))[0], ends_impossible(row)[0]).numpy()
    p = np.exp(logits / 1.5)
    p /= p.sum(1, keepdims=True)
    tail = -np.sort(-p, axis=1)[CANVAS == MASK, 64:].sum(1).mean()
    assert dropped_mass(model, [(CANVAS, 0.8)], 64, 1.5) == pytest.approx(tail, abs=1e-6)


def test_dropped_mass_grows_with_temperature(model: Denoiser) -> None:
    masses = [dropped_mass(model, [(CANVAS, 0.8)], 64, temperature) for temperature in (0.7, 1.0, 1.5)]
    print("top 64 of 512 drop", *(f"{mass:.4f}" for mass in masses))
    assert masses == sorted(masses)
    assert 0 < masses[0] < masses[2] < 1
    assert dropped_mass(model, [(CANVAS, 0.8)], 512, 1.0) == pytest.approx(0, abs=1e-6)


def test_dropped_mass_counts_each_masked_position_once(model: Denoiser) -> None:
    """Two canvases together give their mean weighted by masked positions, not the mean of their means."""
    other = CANVAS.copy()
    other[1:3] = FIRST_TEXT_ID + 1
    apart = [dropped_mass(model, [(canvas, 0.5)], 16, 1.0) for canvas in (CANVAS, other)]
    together = dropped_mass(model, [(CANVAS, 0.5), (other, 0.5)], 16, 1.0)
    assert together == pytest.approx((4 * apart[0] + 2 * apart[1]) / 6, abs=1e-9)
