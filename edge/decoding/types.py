"""What the loops and the backends share: a canvas in progress, how to sample it, the scores of a step.

L: canvas length, M: scored positions, K: candidates of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from shared.manifest import Selection
from shared.tokens import EOS, MASK, PAD

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Positions = NDArray[np.intp]


@dataclass(frozen=True)
class Sampling:
    """How to draw and commit. threshold and entropy_bound replace the fixed schedule; steps is then the maximum.

    One more step follows where the last one drew an end left of text, which cannot be committed with that text.
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
        """Whether the drawn tokens decide which positions are committed; else only committed ones are drawn."""
        return self.threshold is not None or (self.entropy_bound is None and self.selection == "confidence")

    @property
    def least_confidence(self) -> np.float32:
        """The threshold as a log-probability, −87 at least: float32 knows no smaller ones."""
        assert self.threshold is not None
        bound: np.float32 = np.log(max(np.float32(self.threshold), np.finfo(np.float32).tiny))
        return bound

    @property
    def by_chance(self) -> bool:
        """Whether the positions to commit are known before the step; then only they are scored."""
        return self.threshold is None and self.entropy_bound is None and self.selection == "random"


@dataclass(eq=False)
class Row:
    """One canvas (L,) in progress, filled in place where `fill` is true. Independent of the rows beside it.

    draft (L,): the last step's candidates for the positions that it left open: the drawn token where all are drawn,
    else the likeliest. MASK where nothing was scored (`Sampling.by_chance`) or the device reports no candidates.
    """

    canvas: Ids
    fill: Bools
    sampling: Sampling
    step: int = 0
    """Steps so far."""
    draft: Ids = field(init=False)
    left: int = field(init=False)
    """Positions still open; the canvas is finished when there are none."""
    active: int = field(init=False)
    """Positions up to the first visible end, with it; what follows is certain."""

    def __post_init__(self) -> None:
        self.draft = np.full_like(self.canvas, MASK)
        self.recount()

    def open_positions(self) -> Positions:
        """Masked positions that are to be filled, ascending.  → (M,)"""
        return np.flatnonzero(self.fill & (self.canvas == MASK))

    def recount(self) -> None:
        """Bring `left` and `active` up to date after a change of the canvas."""
        self.left = int(np.count_nonzero(self.fill & (self.canvas == MASK)))
        is_end = (self.canvas == EOS) | (self.canvas == PAD)
        first = int(is_end.argmax())
        self.active = first + 1 if is_end[first] else self.canvas.size

    def check_progress(self, left_before: int) -> None:
        """Raise RuntimeError when a step has committed nothing: the loop would never end."""
        if self.left >= left_before:
            raise RuntimeError("the step graph proposes MASK, or an end left of visible text: nothing can be committed")


class StepResult(NamedTuple):
    """The K best tokens of each scored position, in the positions' order; best first, ties by the lower id."""

    ids: Ids  # (M, K)
    logp: Floats  # (M, K) log-probabilities over the full vocabulary
    entropy: Floats  # (M,) nats


class Backend(Protocol):
    """Scores canvases, one a call. A canvas's scores depend on nothing else."""

    lanes: int
    """How many threads may call `score` at once."""

    def score(self, canvas: Ids, t: float, positions: Positions, rows: int = 1) -> StepResult:
        """Score masked positions (M,), ascending, of a canvas (L,) that is cut after its first visible end.

        t: diffusion time. rows: how many canvases are in progress on this backend; they share its threads.
        """

    def close(self) -> None:
        """Free what it holds."""


@runtime_checkable
class LoopBackend(Protocol):
    """A backend that draws and commits on the device: logits never reach Python. Not thread-safe."""

    lengths: tuple[int, ...]
    """Canvas lengths it serves, ascending; the last is the bundle's canvas length."""

    batches: tuple[int, ...]
    """Batch sizes that it has a program for, ascending from 1; other numbers of rows run in the next larger one."""

    failure: str | None
    """Why the device is out of service; None while it is healthy."""

    def advance(self, rows: Sequence[Row], length: int) -> None:
        """One step of at most `batches[-1]` rows, each cut to its first `length` positions; one of `lengths`.

        Changes every row in place, as `edge.decoding.canvas.advance` does for other backends. A row is recognized by
        identity, so nothing else may write to it between two steps. Raises DeviceError. Where `failure` is then set,
        the device is out of service and every later call raises; else only these rows have failed.
        """

    def close(self) -> None:
        """Free what it holds."""


AnyBackend = Backend | LoopBackend
