"""A denoiser that is exactly right, for distributions small enough to enumerate."""

import math
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge.decoding.types import Ids, Positions, StepResult
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD

A, B = FIRST_TEXT_ID, FIRST_TEXT_ID + 1
VOCAB = FIRST_TEXT_ID + 2


class Ideal:
    """Knows the probability of every canvas, so it knows every token's given the visible ones.

    canvases: whole canvases, BOS to the last PAD, with their probabilities. Behaves as a network
    (`host.model.diffusion`) and as a backend (`edge.decoding.canvas`).
    """

    def __init__(self, canvases: Mapping[tuple[int, ...], float]) -> None:
        self.canvases = np.array(list(canvases), np.int64)  # (N, L)
        self.p = np.array(list(canvases.values()))
        assert math.isclose(self.p.sum(), 1.0)
        self.config = SimpleNamespace(time_input=False)
        self.device = torch.device("cpu")
        self.lanes = 1

    def marginals(self, canvas: NDArray[np.int64]) -> NDArray[np.float64]:
        """p(token at each position | visible tokens).  (L,) → (L, V)"""
        visible = canvas != MASK
        length = len(canvas)  # a canvas that was cut is certain behind its end
        agrees = (self.canvases[:, :length] == canvas)[:, visible].all(1)
        posterior = self.p * agrees
        if not posterior.any():  # tokens drawn together have left the distribution: any text may follow
            return np.broadcast_to((np.arange(VOCAB) >= FIRST_TEXT_ID) / (VOCAB - FIRST_TEXT_ID), (length, VOCAB))
        posterior /= posterior.sum()
        one_hot = self.canvases[:, :length, None] == np.arange(VOCAB)  # (N, L, V)
        marginals: NDArray[np.float64] = (posterior[:, None, None] * one_hot).sum(0)
        return marginals

    def score_canvas(self, canvas: Tensor, t: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """As a network: the "hidden state" of a position is its distribution.  (B, L) → (B, L, V), or (M, V) at `at`"""
        hidden = torch.from_numpy(np.stack([self.marginals(_complete(row)) for row in canvas.numpy()]))
        return hidden if at is None else hidden.flatten(0, 1)[at]

    def logits(self, hidden: Tensor, ends_are_impossible: Tensor) -> Tensor:
        """Log-probabilities; the exact posterior already gives impossible tokens none."""
        return hidden.float().log()

    def score(self, canvas: Ids, t: float, positions: Positions, rows: int = 1) -> StepResult:
        """As a backend: all tokens, best first."""
        p = self.marginals(canvas.astype(np.int64))[positions]
        order = np.argsort(-p, axis=1, kind="stable")
        with np.errstate(divide="ignore"):
            logp = np.maximum(np.log(np.take_along_axis(p, order, 1)), -1e4)
        entropy = -(p * np.where(p > 0, np.log(np.where(p > 0, p, 1)), 0)).sum(1)
        return StepResult(order.astype(np.int32), logp.astype(np.float32), entropy.astype(np.float32))

    def close(self) -> None:
        """Nothing to free."""

    def nll(self) -> float:
        """Mean exact negative log-likelihood of a canvas, in nats: the entropy of the distribution."""
        return float(-(self.p * np.log(self.p)).sum())


def _complete(row: NDArray[np.int64]) -> NDArray[np.int64]:
    """Masked positions behind the first visible end hold PAD for certain."""
    ends = np.flatnonzero((row == EOS) | (row == PAD))
    if ends.size:
        row = row.copy()
        row[ends[0] + 1 :] = PAD
    return row


PAIRS = Ideal({(BOS, A, A): 0.4, (BOS, A, B): 0.1, (BOS, B, A): 0.2, (BOS, B, B): 0.3})
"""Two tokens that depend on each other, cut at the canvas end."""

LENGTHS = Ideal(
    {
        (BOS, EOS, PAD, PAD, PAD): 0.1,
        (BOS, A, EOS, PAD, PAD): 0.3,
        (BOS, B, A, EOS, PAD): 0.25,
        (BOS, A, A, B, EOS): 0.2,
        (BOS, B, B, A, A): 0.15,
    }
)
"""Stories of every length, from empty to cut."""
