"""The canvas loop: score the canvas, draw a candidate for every open position, commit some, repeat.

Independent of the backend. `host.sampling.reference` is the same loop in torch; a golden test compares the two.
L: canvas length, M: open positions, K: candidates of each.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from edge.decoding.philox import ORDER_DOMAIN, gumbel, uniform
from edge.decoding.types import AnyBackend, Backend, Floats, Ids, LoopBackend, Positions, Row, Sampling, StepResult
from shared.schedule import ScheduleName, reveal_count, time_of_masked_fraction
from shared.tokens import EOS, FIRST_TEXT_ID, MASK, PAD

COLDEST: Final = 1e-30
"""The least temperature to divide by: argmax already. Below it scores overflow float32 to −∞, and PAD wins the tie."""


def advance(backend: AnyBackend, schedule: ScheduleName, rows: Sequence[Row], under_way: int = 1) -> None:
    """One denoising step of unfinished rows. A LoopBackend takes them together: they must be of one bucket.

    under_way: how many rows are unfinished on this backend, these included.
    """
    if isinstance(backend, LoopBackend):
        backend.advance(rows, bucket(rows[0].active, backend.lengths))
        return
    for row in rows:
        _score_and_commit(backend, schedule, row, under_way)


def _score_and_commit(backend: Backend, schedule: ScheduleName, row: Row, under_way: int) -> None:
    t = time_of_masked_fraction(schedule, np.count_nonzero(row.canvas == MASK) / (row.canvas.size - 1))
    positions = wanted(row)
    commit_step(row, positions, backend.score(row.canvas[: row.active], t, positions, under_way))


def bucket(active: int, lengths: tuple[int, ...]) -> int:
    """The shortest of `lengths`, ascending, that holds the active positions."""
    return next(length for length in lengths if length >= active)


def wanted(row: Row) -> Positions:
    """The open positions whose scores a row's next step needs, ascending.  → (M,)"""
    positions = row.open_positions()
    if row.sampling.by_chance:
        order = chance_order(row.sampling, row.step, positions)
        return np.sort(positions[order[: scheduled_count(row.sampling, row.step, positions.size)]])
    return positions


def commit_step(row: Row, positions: Positions, scored: StepResult) -> None:
    """Commit some of what one step has scored. positions: what `wanted` returned before the step.

    Raises RuntimeError when nothing can be committed.
    """
    sampling, step, left = row.sampling, row.step, row.left
    ids, logp, entropy = scored
    token = np.zeros_like(positions, np.int32)  # (M,)
    confidence = np.zeros_like(entropy)
    chosen = np.arange(positions.size)
    if not sampling.by_chance:
        if sampling.by_confidence:
            token, confidence = draw(ids, logp, sampling=sampling, step=step, position=positions)
        row.draft[positions] = token if sampling.by_confidence else ids[:, 0]
        order = rank(logp, entropy, confidence=confidence, sampling=sampling, step=step, position=positions)
        count = num_to_commit(order, entropy, confidence=confidence, sampling=sampling, step=step, left=left)
        chosen = order[:count]
    if not sampling.by_confidence:  # same tokens as drawing all: a draw depends on its own position only
        token[chosen], _ = draw(ids[chosen], logp[chosen], sampling=sampling, step=step, position=positions[chosen])
    commit(row.canvas, positions[chosen], token[chosen])
    row.step += 1
    row.recount()
    row.check_progress(left)


def draw(ids: Ids, logp: Floats, *, sampling: Sampling, step: int, position: Positions) -> tuple[Ids, Floats]:
    """One candidate for each position, after temperature, top-k and top-p, by the Gumbel-max trick.

    → ids (M,), confidence (M,): their log-probabilities before temperature. Ties go to the lower id.
    """
    if sampling.temperature == 0:
        return ids[:, 0], logp[:, 0]
    ids, logp = ids[:, : sampling.top_k], logp[:, : sampling.top_k]
    score = logp / np.float32(max(sampling.temperature, COLDEST))
    noisy = score + gumbel(sampling.seed, step, position[:, None].astype(np.uint32), ids.astype(np.uint32))
    if sampling.top_p < 1:
        p = np.exp(score - score[:, :1])
        p /= p.sum(1, keepdims=True)
        noisy[np.cumsum(p, 1) - p >= sampling.top_p] = -np.inf  # keeps the first candidate to reach top_p
    best = noisy.max(1, keepdims=True)
    column = np.where(noisy == best, ids, np.iinfo(np.int32).max).argmin(1)[:, None]
    return np.take_along_axis(ids, column, 1)[:, 0], np.take_along_axis(logp, column, 1)[:, 0]


def rank(
    logp: Floats, entropy: Floats, *, confidence: Floats, sampling: Sampling, step: int, position: Positions
) -> Positions:
    """Indices of open positions in the order in which they are committed; ties go to the lower position.  → (M,)"""
    if sampling.threshold is not None:
        score = confidence
    elif sampling.entropy_bound is not None or sampling.selection == "entropy":
        score = -entropy
    elif sampling.selection == "confidence":
        score = confidence
    elif sampling.selection == "margin":
        score = np.exp(logp[:, 0]) - np.exp(logp[:, 1])
    else:
        return chance_order(sampling, step, position)
    return np.argsort(-score, kind="stable")


def chance_order(sampling: Sampling, step: int, position: Positions) -> Positions:
    """`rank` for random selection, which needs no scores.  → (M,)"""
    score = uniform(
        sampling.seed, step, position=position.astype(np.uint32), token=np.zeros(1, np.uint32), domain=ORDER_DOMAIN
    )
    return np.argsort(-score, kind="stable")


def num_to_commit(
    order: Positions, entropy: Floats, *, confidence: Floats, sampling: Sampling, step: int, left: int
) -> int:
    """How many positions this step commits: at least one, and all that are left in the last.

    entropy_bound is the rule of the EB-sampler (Ben-Hamu et al., arXiv 2505.24857): the largest set U, taken by
    ascending entropy H, with Σ H(U) − max H(U) ≤ bound, which bounds the tokens' mutual information given the canvas.
    """
    if step < sampling.steps - 1:
        if sampling.threshold is not None:
            return max(1, int(np.count_nonzero(confidence >= sampling.least_confidence)))
        if sampling.entropy_bound is not None:
            before = np.cumsum(entropy[order][:-1])  # entropies ascend: a set's sum less its largest
            return 1 + int(np.count_nonzero(before <= sampling.entropy_bound))
    return scheduled_count(sampling, step, left)


def scheduled_count(sampling: Sampling, step: int, left: int) -> int:
    """How many positions the unmasking schedule commits in this step: all that are left in the last."""
    return left if step >= sampling.steps - 1 else reveal_count(left, step, sampling.steps)


def commit(canvas: Ids, position: Positions, token: Ids) -> None:
    """Write tokens, and those that follow from them with certainty.

    Tokens of one step are drawn independently. An EOS or PAD left of a text token contradicts it: the text is
    committed, and the position of the end stays open. After the first end everything is PAD, and an end directly after
    text is EOS.
    """
    is_text = token >= FIRST_TEXT_ID
    canvas[position[is_text]] = token[is_text]
    last_text = np.flatnonzero(canvas >= FIRST_TEXT_ID)[-1:].max(initial=0)
    ends = ~is_text & (position > last_text)
    canvas[position[ends]] = token[ends]
    visible_ends = np.flatnonzero((canvas == EOS) | (canvas == PAD))
    if visible_ends.size:
        first = visible_ends[0]
        if canvas[first - 1] != MASK:
            canvas[first] = EOS
        canvas[first + 1 :] = PAD
