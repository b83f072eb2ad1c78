"""The unmasking loop: score the canvas, draw a candidate for every open position, commit some, repeat.

Backend-blind. `host.sampling.reference` says the same in torch; a golden test holds the two together.
L: canvas length, M: open positions, K: candidates of each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge.backends import AnyBackend, LoopBackend, StepResult
from edge.decoding.philox import ORDER_DOMAIN, gumbel, uniform
from shared.manifest import Selection
from shared.schedule import ScheduleName, reveal_count, time_of_masked_fraction
from shared.tokens import EOS, FIRST_TEXT_ID, MASK, PAD

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

COLDEST: Final = 1e-30
"""Argmax already. Divided by less, scores overflow float32 to −∞ together, and the lowest id, PAD, wins the tie."""


@dataclass(frozen=True)
class Sampling:
    """How to draw and commit. threshold and entropy_bound replace the fixed grid; then steps is the most passes.

    One more pass follows where the last one drew an end left of text, and the end had to wait.
    """

    seed: int
    steps: int
    selection: Selection
    temperature: float
    top_k: int
    top_p: float
    threshold: float | None = None
    entropy_bound: float | None = None

    @property
    def by_confidence(self) -> bool:
        """Whether what is drawn decides what is committed; else only what is committed needs to be drawn."""
        return self.threshold is not None or (self.entropy_bound is None and self.selection == "confidence")

    @property
    def by_chance(self) -> bool:
        """Whether what is committed is known before the pass; then only that needs to be scored."""
        return self.threshold is None and self.entropy_bound is None and self.selection == "random"


@dataclass(eq=False)
class Row:
    """One canvas (L,) on its way, filled in place where `fill` is true. It knows nothing of its neighbours.

    draft (L,): what the last pass would have put at the positions that it left open: the candidate drawn, where every
    one is drawn, else the likeliest. MASK where nobody looked (`Sampling.by_chance`), or a device does not tell.
    """

    canvas: Ids
    fill: Bools
    sampling: Sampling
    step: int = 0  # passes so far
    draft: Ids = field(init=False)

    def __post_init__(self) -> None:
        self.draft = np.full_like(self.canvas, MASK)

    @property
    def left(self) -> int:
        """Positions still open; the canvas is finished when there are none."""
        return int(np.count_nonzero(self.fill & (self.canvas == MASK)))

    def wanted(self) -> NDArray[np.intp]:
        """The open positions whose scores its next pass needs, ascending.  → (M,)"""
        position = np.flatnonzero(self.fill & (self.canvas == MASK))
        if self.sampling.by_chance:
            order = chance_order(self.sampling, self.step, position)
            return np.sort(position[order[: on_grid(self.sampling, self.step, position.size)]])
        return position

    def commit(self, position: NDArray[np.intp], scored: StepResult) -> None:
        """Commit some of what one pass saw on this canvas: ids, logp (L', K), entropy (L',), L' up to its end.

        position: what `wanted` answered before the pass.
        """
        sampling, step, left = self.sampling, self.step, self.left
        ids, logp, entropy = scored.ids[position], scored.logp[position], scored.entropy[position]
        token = np.zeros_like(position, np.int32)  # (M,)
        confidence = np.zeros_like(entropy)
        chosen = np.arange(position.size)
        if not sampling.by_chance:
            if sampling.by_confidence:
                token, confidence = draw(ids, logp, sampling, step, position)
            self.draft[position] = token if sampling.by_confidence else ids[:, 0]
            order = rank(logp, entropy, confidence, sampling, step, position)
            chosen = order[: how_many(order, entropy, confidence, sampling, step, left)]
        if not sampling.by_confidence:  # the same tokens as drawing them all: a draw knows its own position only
            token[chosen], _ = draw(ids[chosen], logp[chosen], sampling, step, position[chosen])
        commit(self.canvas, position[chosen], token[chosen])
        self.step += 1
        self.check_progress(left)

    def check_progress(self, before: int) -> None:
        """Raise RuntimeError when a pass has committed nothing: the loop would never end. before: `left` before it."""
        if self.left >= before:
            raise RuntimeError("the step graph proposes MASK, or an end left of visible text: nothing can be committed")


def advance(backend: AnyBackend, schedule: ScheduleName, rows: Sequence[Row], length: int) -> None:
    """One pass over unfinished rows whose active_bucket is `length`, on the device if that is where the loop runs.

    Their number is one of the backend's batches.
    """
    if isinstance(backend, LoopBackend):
        backend.advance(rows, length)
        return
    masked = [np.count_nonzero(row.canvas == MASK) / (row.canvas.size - 1) for row in rows]
    t = np.array([time_of_masked_fraction(schedule, fraction) for fraction in masked], np.float32)
    positions = [row.wanted() for row in rows]
    wanted = np.zeros((len(rows), length), np.bool_)
    for i, position in enumerate(positions):
        wanted[i, position] = True
    scored = backend.step(np.stack([row.canvas[:length] for row in rows]), t, wanted)
    for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
        row.commit(position, StepResult(scored.ids[i], scored.logp[i], scored.entropy[i]))


def unmask(
    backend: AnyBackend,
    schedule: ScheduleName,
    canvas: Ids,
    fill: Bools,
    sampling: Sampling,
    on_step: Callable[[int, Ids], None],
) -> int:
    """Fill a canvas (L,) in place where `fill` is true; calls on_step(passes so far, canvas).  → passes made"""
    row = Row(canvas, fill, sampling)
    while row.left:
        advance(backend, schedule, [row], active_bucket(canvas, backend.lengths))
        on_step(row.step, canvas)
    return row.step


def active_length(canvas: Ids) -> int:
    """Positions up to the first visible EOS or PAD, with it; what follows is certain."""
    ends = np.flatnonzero((canvas == EOS) | (canvas == PAD))
    return int(ends[0]) + 1 if ends.size else canvas.size


def active_bucket(canvas: Ids, lengths: tuple[int, ...]) -> int:
    """The shortest length that holds everything up to the first visible end."""
    active = active_length(canvas)
    return next(length for length in lengths if length >= active)


def draw(ids: Ids, logp: Floats, sampling: Sampling, step: int, position: NDArray[np.intp]) -> tuple[Ids, Floats]:
    """One candidate a position, after temperature, top-k and top-p, by the Gumbel-max trick.  → ids, confidence (M,)

    confidence is the candidate's log-probability before temperature. Ties go to the lower id.
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
    logp: Floats, entropy: Floats, confidence: Floats, sampling: Sampling, step: int, position: NDArray[np.intp]
) -> NDArray[np.intp]:
    """Order in which open positions are committed, the first first; ties go to the lower position.  → (M,)"""
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


def chance_order(sampling: Sampling, step: int, position: NDArray[np.intp]) -> NDArray[np.intp]:
    """What `rank` answers where chance decides, which needs no scores.  → (M,)"""
    score = uniform(sampling.seed, step, position.astype(np.uint32), np.zeros(1, np.uint32), ORDER_DOMAIN)
    return np.argsort(-score, kind="stable")


def how_many(
    order: NDArray[np.intp], entropy: Floats, confidence: Floats, sampling: Sampling, step: int, left: int
) -> int:
    """How many positions this pass commits: at least one, and all that are left in the last pass.

    entropy_bound is the rule of the EB-sampler (Ben-Hamu et al., arXiv 2505.24857): the largest set U, taken by
    ascending entropy H, with Σ H(U) − max H(U) ≤ bound, which bounds the tokens' mutual information given the canvas.
    """
    if step < sampling.steps - 1:
        if sampling.threshold is not None:
            return max(1, int(np.count_nonzero(confidence >= np.log(np.float32(sampling.threshold)))))
        if sampling.entropy_bound is not None:
            before = np.cumsum(entropy[order][:-1])  # entropies ascend: a set's sum less its largest
            return 1 + int(np.count_nonzero(before <= sampling.entropy_bound))
    return on_grid(sampling, step, left)


def on_grid(sampling: Sampling, step: int, left: int) -> int:
    """How many positions the fixed number of steps commits in this pass: all that are left in the last."""
    return left if step >= sampling.steps - 1 else reveal_count(left, step, sampling.steps)


def commit(canvas: Ids, position: NDArray[np.intp], token: Ids) -> None:
    """Write tokens for good, and what follows from them with certainty.

    Tokens drawn in one pass do not know of each other: an EOS or PAD left of a text token cannot stand, so text is
    committed and the end stays open for a later pass. Behind the first end everything is PAD, and an end directly
    behind text is EOS.
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
