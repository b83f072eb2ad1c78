"""A checked request, from its plan to its text, by either decoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from edge.decoding import blocks
from edge.decoding.blocks import BlocksLoop, Law, RowsBackend, Writing
from edge.decoding.canvas import advance, bucket
from edge.decoding.conditions import Condition
from edge.decoding.layout_text import HALF, Layout, Texts
from edge.decoding.together import SharedRows
from edge.decoding.types import AnyBackend, Ids, Row, Sampling
from edge.serving.slots import Slots
from shared.manifest import Decoder, Manifest
from shared.messages import Part
from shared.tokens import MASK, PAD


@dataclass(frozen=True)
class Plan:
    """A request that was checked and can no longer fail for its own fault, by canvas (`Sampling`) or blocks (`Law`).

    condition: of blocks alone.
    """

    layout: Layout
    sampling: Sampling | Law
    condition: Condition | None = None

    @property
    def decoder(self) -> Decoder:
        """Which of the two."""
        return "blocks" if isinstance(self.sampling, Law) else "canvas"

    @property
    def seed(self) -> int:
        """The seed that reproduces the text."""
        return self.sampling.seed

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the given text."""
        return self.layout.prompt_tokens


@dataclass(frozen=True)
class Snapshot:
    """A run between two passes; read text and parts before the next pass changes them.

    appended: what a prompt's text has grown by since the last snapshot; None by canvas and with gaps, where text
    appears anywhere.
    """

    step: int  # passes so far
    steps: int  # the most there can be
    masked: int  # positions of the request still open
    text: Callable[[], str]
    parts: Callable[[], list[Part]]  # with what is drafted at the open positions
    appended: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Completion:
    """The result of a plan. canvas (L,): the final ids. full: whether the text fills all the room that it had.

    tried[n], kept[n]: how many passes of blocks held n drafts, and kept n of them.
    """

    text: str
    canvas: Ids
    generated_tokens: int
    steps: int
    full: bool
    tried: Sequence[int] = ()
    kept: Sequence[int] = ()


class Run(Protocol):
    """A plan in progress."""

    plan: Plan

    @property
    def done(self) -> bool:
        """Whether all positions are filled."""

    def ready(self, client: str = "") -> bool:
        """Whether it can run its next pass; takes a place on the backend if it needs one and `client` may have one.

        Not thread-safe: asked under the lock of whoever schedules.
        """

    def positions(self) -> int:
        """How many positions its next pass computes."""

    def snapshot(self) -> Snapshot:
        """Its state between two passes."""

    def completion(self) -> Completion:
        """Its result, once it is done."""

    def close(self) -> None:
        """Free its place on the backend."""


class CanvasRun:
    """By full-canvas diffusion."""

    def __init__(self, plan: Plan, texts: Texts, backend: AnyBackend) -> None:
        assert isinstance(plan.sampling, Sampling)
        self.plan, self._texts = plan, texts
        self.row = Row(plan.layout.canvas.copy(), plan.layout.fill, plan.sampling)
        self._most = min(plan.sampling.steps, self.row.left)
        # Once, not at every pass: isinstance with a protocol would cost more than all the rest.
        self._lengths: tuple[int, ...] | None = getattr(backend, "lengths", None)

    @property
    def done(self) -> bool:
        """See `Run`."""
        return self.row.left == 0

    def ready(self, client: str = "") -> bool:
        """See `Run`."""
        return True

    def positions(self) -> int:
        """See `Run`."""
        return self.row.active if self._lengths is None else bucket(self.row.active, self._lengths)

    def snapshot(self) -> Snapshot:
        """See `Run`."""
        row, layout = self.row, self.plan.layout
        text, parts = (lambda: self._texts.read(layout, row.canvas)), self._parts
        return Snapshot(row.step, max(self._most, row.step), row.left, text, parts)

    def completion(self) -> Completion:
        """See `Run`."""
        return completion_of(self.plan, self._texts, self.row.canvas, self.row.step)

    def close(self) -> None:
        """See `Run`."""

    def _parts(self) -> list[Part]:
        return self._texts.parts(self.plan.layout, self.row.canvas, self.row.draft)


class BlocksRun:
    """From the left, by the network's own law."""

    def __init__(
        self, plan: Plan, texts: Texts, *, slots: Slots, vocab_size: int, step_rows: int | None = None
    ) -> None:
        """step_rows: of every pass after the first, on a backend whose passes have one shape."""
        assert isinstance(plan.sampling, Law)
        self.plan, self._texts, self._slots, self._step_rows = plan, texts, slots, step_rows
        layout = plan.layout
        self.writing = Writing(
            layout.canvas.copy(), layout.fill, layout.open_end, plan.sampling, vocab_size, condition=plan.condition
        )
        self._client = ""  # that holds its slot
        self._most = self.writing.left
        self._sent = "".join(part for part in layout.parts if isinstance(part, str))
        self._stopped = False

    @property
    def done(self) -> bool:
        """See `Run`."""
        return self.writing.done or self._stopped

    def look_for_stop(self) -> None:
        """After each pass: a stop string ends the text of a prompt; a gap is filled to its end, and cut there."""
        layout = self.plan.layout
        self._stopped = bool(layout.stops) and layout.open_end and self._texts.stopped(layout, self.writing.canvas)

    def ready(self, client: str = "") -> bool:
        """See `Run`."""
        if self.writing.slot is None:
            self.writing.slot, self._client = self._slots.take(client), client
        return self.writing.slot is not None

    def positions(self) -> int:
        """See `Run`."""
        return self.writing.cost if self._step_rows is None or self.writing.reads else self._step_rows

    def snapshot(self) -> Snapshot:
        """See `Run`."""
        w = self.writing
        return Snapshot(w.passes, max(self._most, w.passes), w.left, self._text, self._parts, self._appended)

    def completion(self) -> Completion:
        """See `Run`."""
        w = self.writing
        return replace(completion_of(self.plan, self._texts, w.canvas, w.passes), tried=w.tried, kept=w.kept)

    def close(self) -> None:
        """See `Run`."""
        slot, self.writing.slot = self.writing.slot, None
        if slot is not None:
            self._slots.give_back(slot, self._client)

    def _text(self) -> str:
        return "".join(part.text for part in self._shown(()))

    def _parts(self) -> list[Part]:
        return self._shown(self.writing.drafts)

    def _appended(self) -> str | None:
        if not self.plan.layout.open_end:
            return None
        new = self._text()[len(self._sent) :]
        self._sent += new
        return new

    def _shown(self, drafts: Sequence[int]) -> list[Part]:
        w, layout = self.writing, self.plan.layout
        draft = np.full_like(w.canvas, PAD if layout.open_end else MASK)  # nothing is known of where a text ends
        draft[w.position + 1 : w.position + 1 + len(drafts)] = drafts
        return whole_characters(self._texts.parts(layout, w.canvas, draft))


def whole_characters(parts: Sequence[Part]) -> list[Part]:
    """Without the bytes at the end of committed text and around drafts that only later tokens make a character of."""
    cut = (Part(part.text.strip(HALF) if part.draft else part.text.rstrip(HALF), part.draft) for part in parts)
    return [part for part in cut if part.text]


def completion_of(plan: Plan, texts: Texts, canvas: Ids, passes: int) -> Completion:
    """A finished canvas as an answer's content."""
    layout = plan.layout
    if layout.open_end and texts.stopped(layout, canvas):
        canvas = np.where(canvas == MASK, PAD, canvas)  # what a stop string has left unwritten
    generated = int(np.count_nonzero(layout.fill & (canvas != PAD)))
    full = generated == np.count_nonzero(layout.fill) and not texts.stopped(layout, canvas)
    return Completion(texts.read(layout, canvas), canvas, generated, passes, full)


def step(
    runs: Sequence[Run],
    manifest: Manifest,
    *,
    backend: AnyBackend | None,
    rows: RowsBackend | None,
    shared: SharedRows | None,
    loop: BlocksLoop | None,
    under_way: int,
) -> None:
    """One pass of unfinished runs of one decoder, and of equal `positions`. rows, shared, loop: what blocks are decoded
    by, one request a pass, several, or on the device.
    """
    first = runs[0]
    if isinstance(first, BlocksRun):
        together = [run for run in runs if isinstance(run, BlocksRun)]
        if loop is not None:
            loop.advance([run.writing for run in together])
        elif shared is not None:
            shared.advance([run.writing for run in together], under_way)
        else:
            assert rows is not None
            blocks.advance(rows, first.writing, under_way)
        for run in together:
            run.look_for_stop()
    else:
        assert backend is not None
        advance(backend, manifest.schedule, [run.row for run in runs if isinstance(run, CanvasRun)], under_way)
