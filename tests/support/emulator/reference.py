"""What the kernels must do, in numpy: the CPU graph's reduction of logits, then `edge.decoding.canvas` itself."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.decoding.canvas import COLDEST, draw, num_to_commit, rank
from edge.decoding.philox import gumbel
from edge.decoding.types import Row, Sampling, StepResult
from shared.tokens import MASK

HALF_MAX = 65504.0


def reduce_logits(logits: NDArray[np.float16], k: int) -> StepResult:
    """FP16 logits (L, V) → the K best, as a step graph for the CPU gives them: float64 inside, float32 out."""
    x = np.clip(logits.astype(np.float64), -HALF_MAX, HALF_MAX)
    shifted = x - x.max(1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    ids = np.argsort(-x, axis=1, kind="stable")[:, :k].astype(np.int32)  # ties: the lower id first
    entropy = -(np.exp(logp) * logp).sum(1)
    return StepResult(
        ids, np.take_along_axis(logp, ids.astype(np.intp), 1).astype(np.float32), entropy.astype(np.float32)
    )


class Drawn(NamedTuple):
    """Candidates of the open positions (M,), and by how much the closest decision was decided."""

    position: NDArray[np.intp]
    token: NDArray[np.int32]
    confidence: NDArray[np.float32]
    entropy: NDArray[np.float32]
    score: NDArray[np.float32]  # what `random`, `confidence` … rank by
    margin: float  # the least difference of two noisy scores that decided a draw


def drawn(scored: StepResult, row: Row) -> Drawn:
    """The reference's draw at every open position of one row."""
    position = np.flatnonzero(row.fill & (row.canvas == MASK))
    ids, logp, entropy = scored.ids[position], scored.logp[position], scored.entropy[position]
    token, confidence = draw(ids, logp, sampling=row.sampling, step=row.step, position=position)
    score = np.exp(logp[:, 0]) - np.exp(logp[:, 1])
    return Drawn(position, token, confidence, entropy, score, _draw_margin(ids, logp, row.sampling, row.step, position))


def _draw_margin(ids: Any, logp: Any, sampling: Sampling, step: int, position: Any) -> float:
    """The gap between the two best noisy scores and, with top-p, between its bound and the nearest cumulated mass."""
    if sampling.temperature == 0 or position.size == 0:
        return float("inf")  # ids are sorted by exact FP16 values
    ids, logp = ids[:, : sampling.top_k], logp[:, : sampling.top_k]
    score = logp / np.float32(max(sampling.temperature, COLDEST))
    noisy = score + gumbel(sampling.seed, step, position[:, None].astype(np.uint32), ids.astype(np.uint32))
    margin = float("inf")
    if sampling.top_p < 1:
        p = np.exp(score - score[:, :1])
        p /= p.sum(1, keepdims=True)
        before = np.cumsum(p, 1) - p
        margin = float(np.abs(before[:, 1:] - sampling.top_p).min(initial=1.0))
        noisy = np.where(before >= sampling.top_p, -np.inf, noisy)
    if noisy.shape[1] > 1:
        two = np.sort(noisy, axis=1)[:, -2:]
        gap = (two[:, 1] - two[:, 0]) / np.maximum(1.0, np.abs(two[:, 1]))
        if sampling.temperature < 1e-6:  # noise is lost beside such scores: equal ones are equal everywhere
            gap = gap[gap > 0]
        margin = min(margin, float(gap.min(initial=1.0)))
    return margin


def committed(scored: StepResult, row: Row, drawn_: Drawn) -> tuple[NDArray[np.intp], int]:
    """The reference's order of commitment, and how many it commits."""
    p = drawn_.position
    known: Any = {"confidence": drawn_.confidence, "sampling": row.sampling, "step": row.step}
    order = rank(scored.logp[p], drawn_.entropy, **known, position=p)
    return order, num_to_commit(order, drawn_.entropy, **known, left=p.size)
