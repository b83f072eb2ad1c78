"""The blocks loop: a pass over the last committed token and the drafts after it, kept as far as the law draws the same.

Independent of the backend. The token of position p is the arg max of the filtered scores of the row at p − 1 plus the
noise of (seed, p, token); a draft for p is the arg max of the drafter's plus the same noise. So drafts change how many
passes a text takes, never the text (Daliri et al., arXiv 2408.07978). `host.sampling.blocks` is the same loop in torch;
a golden test compares the two.
L: canvas length, N: rows of a pass, M: scored rows, V: vocabulary, C: rows that a slot holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import numpy as np

from edge.decoding.canvas import COLDEST
from edge.decoding.conditions import Condition, Remaining
from edge.decoding.philox import Noise
from edge.decoding.types import Bools, Floats, Ids
from edge.decoding.winners import filtered, winners
from shared.tokens import EOS, MASK, PAD

NOT_NUMBERS: Final = "the step graph gives scores that are not numbers"
SLOTS: Final = 8
"""Requests that hold keys and values at once; the others wait for a place. 2.6 MB each in a `tiny` network."""


@dataclass(frozen=True)
class Law:
    """How tokens are drawn. window: the most drafts in a pass."""

    seed: int
    temperature: float
    top_k: int
    top_p: float
    window: int


class RowScores(NamedTuple):
    """Of each scored row. Valid until the slot's next pass."""

    scores: Floats  # (M, V), before the softmax
    states: Floats  # (M, D), that they are read from


@dataclass(eq=False)
class Slot:
    """Keys and values of one request on a backend. `cached` rows are kept; what lies behind them is overwritten.

    condition: the encoded words and pictures that its rows read; None without any.
    """

    positions: Ids  # (C,) of the rows
    memory: Any  # the backend's own
    cached: int = 0
    condition: Any = None  # the backend's own, too


class Rows(NamedTuple):
    """What a pass computes of one request: rows (N,) behind those kept in its slot; the last `scored` are scored."""

    slot: Slot
    tokens: Ids
    positions: Ids
    scored: int


@runtime_checkable
class RowsBackend(Protocol):
    """Scores rows that see those kept in their slot and the ones before them. Their scores depend on nothing else."""

    depth: int
    """The most drafts that `draft` makes."""

    lanes: int
    """How many threads may call it at once, each with a slot of its own."""

    fills_gaps: bool
    """Whether it has `prefill`."""

    def open_slot(self) -> Slot:
        """An empty slot."""

    def prefill(self, slot: Slot, tokens: Ids, positions: Ids) -> None:
        """Keep rows (N,) that all see each other, in an empty slot: the given text on both sides of gaps."""

    def rows(self, slot: Slot, tokens: Ids, *, positions: Ids, scored: int, under_way: int = 1) -> RowScores:
        """One pass over rows (N,), each of which sees the kept rows, the ones before it and itself; the last `scored`
        are scored. Keeps none of them: the caller does, by adding to `slot.cached`. under_way: requests that share the
        threads.
        """

    def draft(self, slot: Slot, state: Floats, *, token: int, noise: Floats, law: Law) -> Ids:
        """Drafts (depth,) for the positions after `token`'s.  state (D,) of the row that drew it, noise (depth, V)

        Valid until the slot's next drafts.
        """

    def close(self) -> None:
        """Free what it holds."""


@runtime_checkable
class TakesConditions(Protocol):
    """A backend of rows that can read the memory of a condition, on the CPU or a GPU."""

    fills_conditioned_gaps: bool
    """Whether the given text around gaps can read it, too."""

    def load(self, condition: Condition) -> None:
        """Load what such a condition needs. The first of its kind may take a while: not for the thread of a lane."""


@runtime_checkable
class ConditionedRows(RowsBackend, TakesConditions, Protocol):
    """Such a backend on the CPU."""

    def encode(self, slot: Slot, condition: Condition) -> None:
        """Encode it for an empty slot, whose rows read it from then on."""

    def narrow(self, slot: Slot, remaining: Remaining) -> None:
        """From now on its rows do not read what is `hidden` of the condition; nothing of it where `nothing` is left."""


@dataclass(eq=False)
class Writing:
    """One canvas (L,) in progress, its gaps filled in place from the left. Independent of other requests.

    fill (L,): the positions of the gaps, each laid out at its full size. open_end: it is a prompt, whose one gap has
    nothing after it, and all rows are causal; else the given text is prefilled as evidence. condition: to encode before
    the first pass.
    """

    canvas: Ids
    fill: Bools
    open_end: bool
    law: Law
    vocab_size: int
    slot: Slot | None = None
    condition: Condition | None = None
    remaining: Remaining | None = None
    """What its rows read, from when the condition is encoded until there is nothing left of it."""
    passes: int = 0
    tried: list[int] = field(init=False)
    """tried[n]: passes that held n drafts."""
    kept: list[int] = field(init=False)
    """kept[n]: passes that kept n of them."""
    done: bool = False
    drafts: list[int] = field(default_factory=list)
    """For the positions after `position`."""
    pending: list[int] = field(init=False)
    """Committed tokens up to `position` whose rows are not kept yet."""
    position: int = field(init=False)
    gaps: list[tuple[int, int]] = field(init=False)
    """First and last position of each gap that is still open, the first of them under way."""
    evidence: tuple[Ids, Ids] | None = field(init=False)
    """Tokens and positions of rows to prefill."""
    noise: Noise = field(init=False)

    def __post_init__(self) -> None:
        edges = np.flatnonzero(np.diff(np.concatenate([[False], self.fill, [False]]).astype(np.int8)))
        self.gaps = [(int(a), int(b) - 1) for a, b in edges.reshape(-1, 2)]
        self.noise = Noise(self.law.seed, self.vocab_size, none=self.law.temperature == 0)
        self.tried, self.kept = [0] * (self.law.window + 1), [0] * (self.law.window + 1)
        given = np.flatnonzero(~self.fill & (self.canvas != MASK) & (self.canvas != PAD)).astype(np.int32)
        first, last = self.gaps[0][0], self.gaps[-1][1]
        if self.open_end:
            self.pending, self.evidence = self.canvas[given].tolist(), None
        else:
            tokens, end = self.canvas[given], max(int(given[-1]), last) + 1
            if end < self.canvas.size:  # there is room to say that the text ends
                given, tokens = np.append(given, np.int32(end)), np.append(tokens, np.int32(EOS))
            self.pending, self.evidence = [int(self.canvas[first - 1])], (tokens, given)
        self.position = first - 1

    def tell(self, new: list[int]) -> int | None:
        """Take note of the first word that the next tokens tell.  → where in `new`, as `Remaining.tell`"""
        if self.remaining is None or not self.remaining.left:
            return None
        longest = max(len(self.remaining.condition.words[i]) for i in self.remaining.left)
        start = max(self.gaps[0][0], self.position + 1 - longest)
        return self.remaining.tell(self.canvas[start : self.position + 1].tolist(), new)

    @property
    def left(self) -> int:
        """Positions of open gaps that hold no token yet."""
        return sum(last - max(first - 1, self.position) for first, last in self.gaps)

    @property
    def conditioned(self) -> bool:
        """Whether its next rows read a condition."""
        return self.condition is not None or self.remaining is not None

    @property
    def reads(self) -> bool:
        """Whether its next pass is the first, which reads the given text."""
        return self.passes == 0

    @property
    def cost(self) -> int:
        """Rows of the next pass."""
        given = 0 if self.evidence is None else self.evidence[0].size
        return len(self.pending) + len(self.drafts) + given + (0 if self.condition is None else self.condition.cost)


@runtime_checkable
class BlocksLoop(Protocol):
    """A backend that draws, keeps and drafts on the device: scores never reach Python. Not thread-safe."""

    depth: int
    """The most drafts of a pass."""

    lanes: int
    fills_gaps: bool

    batches: tuple[int, ...]
    """How many requests a pass takes, ascending from 1, one of them where a request `reads`."""

    failure: str | None
    """Why the device is out of service; None while it is healthy."""

    def open_slot(self) -> Slot:
        """An empty slot."""

    def advance(self, writings: Sequence[Writing]) -> None:
        """One pass of each, as `advance` makes it; a first pass reads the given text.

        A request is recognized by identity. Raises DeviceError. Where `failure` is then set, the device is out of
        service and every later call raises; else only requests whose scores are no numbers have failed, and are as
        they were before.
        """

    def close(self) -> None:
        """Free what it holds."""


AnyRows = RowsBackend | BlocksLoop


def advance(backend: RowsBackend, writing: Writing, under_way: int = 1) -> None:
    """One pass: commits one token and every draft that the law draws too, then drafts again."""
    begin(backend, writing)
    slot, tokens, positions, scored = next_rows(writing)
    scores, states = backend.rows(slot, tokens, positions=positions, scored=scored, under_way=under_way)
    finish(backend, writing, states, draw_rows(writing, scores))


def begin(backend: RowsBackend, w: Writing) -> None:
    """Before the first pass: encode the condition, prefill the given text around gaps."""
    assert w.slot is not None
    if w.condition is not None:
        assert isinstance(backend, ConditionedRows)
        backend.encode(w.slot, w.condition)
        w.remaining, w.condition = Remaining(w.condition), None
    if w.evidence is not None:
        backend.prefill(w.slot, *w.evidence)
        w.evidence = None


def next_rows(w: Writing) -> Rows:
    """The rows of its next pass: committed tokens that are not kept yet, and the drafts after them."""
    assert w.slot is not None
    tokens = np.array([*w.pending, *w.drafts], np.int32)
    places = np.arange(tokens.size, dtype=np.int32) + (w.position - len(w.pending) + 1)
    return Rows(w.slot, tokens, places, len(w.drafts) + 1)


def draw_rows(w: Writing, scores: Floats) -> list[int]:
    """The tokens that follow the last one and each draft.  scores (M, V)"""
    return draw(scores, w.noise.of(w.position + 1, len(scores)), w.law).tolist()  # type: ignore[no-any-return]


def finish(backend: RowsBackend, w: Writing, states: Floats, drawn: list[int]) -> None:
    """The end of a pass: commit, and draft again.  states (M, D)"""
    agreed, is_open, told = keep(w, drawn)
    if told:
        narrow(backend, w)
    if is_open:
        draft_again(backend, w, states[agreed])


def narrow(backend: RowsBackend, w: Writing) -> None:
    """A word was told: later rows do not read it."""
    assert w.slot is not None and w.remaining is not None and isinstance(backend, ConditionedRows)
    backend.narrow(w.slot, w.remaining)
    w.remaining = None if w.remaining.nothing else w.remaining


def keep(w: Writing, drawn: list[int]) -> tuple[int, bool, bool]:
    """Commit what was drawn as far as the drafts agree, and no further than where a word is told: what follows is drawn
    anew, no longer asked for it.

    → how many drafts agree so far, whether the gap is open still, whether a word was told
    """
    assert w.slot is not None
    agreed = 0
    while agreed < len(w.drafts) and w.drafts[agreed] == drawn[agreed]:
        agreed += 1
    told = w.tell(drawn[: agreed + 1])
    agreed = agreed if told is None else told
    w.slot.cached += len(w.pending) + agreed
    w.passes += 1
    w.tried[len(w.drafts)] += 1
    w.kept[agreed] += 1
    return agreed, commit(w, drawn[: agreed + 1]), told is not None


def draw(scores: Floats, noise: Floats, law: Law) -> Ids:
    """The token of each row (M,), after temperature, top-k and top-p, with its position's noise. Ties: the lower id.

    scores, noise (M, V). The token with the best noisy score of all is the draw if top-k and top-p keep it; only for
    other rows is the vocabulary filtered. RuntimeError for scores that are not numbers.
    """
    cooled = 0.0 if law.temperature == 0 else max(law.temperature, COLDEST)
    token, rank = winners(scores, noise, cooled)
    if not rank.all():
        raise RuntimeError(NOT_NUMBERS)
    surely_kept = law.top_k if law.top_p == 1 else 1
    for row in np.flatnonzero((rank > surely_kept) & (cooled > 0)).tolist():
        scaled = scores[row] / np.float32(cooled)
        token[row] = filtered(scaled, scaled + noise[row], top_k=law.top_k, top_p=law.top_p)
    return token


def commit(w: Writing, new: list[int]) -> bool:
    """Write tokens after `position`; an EOS, or the last position, closes the gap.  → whether it is open still"""
    last = w.gaps[0][1]
    w.canvas[w.position + 1 : w.position + 1 + len(new)] = new
    w.position += len(new)
    w.pending, w.drafts = [new[-1]], []
    if new[-1] != EOS and w.position < last:
        return True
    w.canvas[w.position + 1 : last + 1] = PAD
    del w.gaps[0]
    w.done = not w.gaps
    if w.gaps:
        w.position = w.gaps[0][0] - 1
    w.pending = [] if w.done else [int(w.canvas[w.position])]
    return False


def draft_again(backend: RowsBackend, w: Writing, state: Floats) -> None:
    """Draft behind the last token, drawn of a row in this state (D,); nothing from an EOS on, which the law draws by
    itself, as it does a gap's last position."""
    count = min(w.law.window, backend.depth, w.gaps[0][1] - w.position - 1)
    if count > 0:
        assert w.slot is not None
        noise = w.noise.of(w.position + 1, backend.depth)
        made: list[int] = backend.draft(w.slot, state, token=w.pending[-1], noise=noise, law=w.law)[:count].tolist()
        w.drafts = made[: made.index(EOS)] if EOS in made else made
