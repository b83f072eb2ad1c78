"""Backends that stand for a network in tests of the edge's loop, and what is asked of every finished canvas."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.backends import choose_backend
from edge.decoding.canvas import advance
from edge.decoding.types import AnyBackend, Ids, Positions, Row, Sampling, StepResult
from shared.manifest import Manifest
from shared.schedule import ScheduleName
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD

NEVER = -1e4


@dataclass
class Noise:
    """A network whose scores are noise, a function of the whole canvas; forbids what the real graph forbids."""

    vocab: int
    k: int
    seed: int
    spread: float = 1.0
    times: list[float] = field(default_factory=list)
    lanes: int = 1

    def score(self, canvas: Ids, t: float, positions: Positions, rows: int = 1) -> StepResult:
        self.times.append(t)
        rng = np.random.default_rng([self.seed, *canvas.tolist()])
        score = rng.normal(0, self.spread, (canvas.size, self.vocab))
        score[:, [MASK, BOS]] = NEVER
        last_text = np.flatnonzero(canvas >= FIRST_TEXT_ID)[-1:].max(initial=-1)
        score[: max(0, last_text), [EOS, PAD]] = NEVER
        logp = (score - np.log(np.exp(score).sum(1, keepdims=True)))[positions]
        order = np.argsort(-logp, axis=1, kind="stable")[:, : self.k]
        entropy = -(np.exp(logp) * logp).sum(1)
        best = np.take_along_axis(logp, order, 1)
        return StepResult(order.astype(np.int32), best.astype(np.float32), entropy.astype(np.float32))

    def close(self) -> None:
        """Nothing to free."""


@dataclass
class Constant:
    """The same scored candidates at every position."""

    ids: NDArray[np.int32]  # (K,)
    logp: NDArray[np.float32]  # (K,)
    lanes: int = 1

    def score(self, canvas: Ids, t: float, positions: Positions, rows: int = 1) -> StepResult:
        shape = (positions.size, self.ids.size)
        entropy = np.full(positions.size, 1.0, np.float32)
        return StepResult(np.broadcast_to(self.ids, shape), np.broadcast_to(self.logp, shape), entropy)

    def close(self) -> None:
        """Nothing to free."""


def open_canvas(length: int) -> NDArray[np.int32]:
    canvas = np.full(length, MASK, np.int32)
    canvas[0] = BOS
    return canvas


def load_backend(name: str, folder: Path, manifest: Manifest, threads: int) -> AnyBackend:
    """The backend for canvases of that name."""
    backend = choose_backend(name, folder, manifest, threads).backend
    assert backend is not None
    return backend


def unmask(backend: AnyBackend, schedule: ScheduleName, row: Row, on_step: Callable[[], None] = lambda: None) -> int:
    """Fill one row's canvas in place.  → steps made"""
    while row.left:
        advance(backend, schedule, [row])
        on_step()
    return row.step


def filled(
    backend: AnyBackend, canvas: NDArray[np.int32], sampling: Sampling, schedule: ScheduleName = "linear"
) -> tuple[NDArray[np.int32], list[int]]:
    """→ the finished canvas, and how many positions were open after each pass"""
    row, left = Row(canvas.copy(), canvas == MASK, sampling), list[int]()
    steps = unmask(backend, schedule, row, lambda: left.append(row.left))
    assert steps == len(left)
    return row.canvas, left


def assert_sound(canvas: NDArray[np.int32]) -> None:
    """BOS, text, then nothing or EOS and only PAD."""
    assert canvas[0] == BOS
    ends = np.flatnonzero(canvas[1:] < FIRST_TEXT_ID) + 1
    if ends.size:
        assert canvas[ends[0]] == EOS
        assert (canvas[ends[0] + 1 :] == PAD).all()
