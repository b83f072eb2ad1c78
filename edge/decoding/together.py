"""One pass of several requests by blocks, two rows of each: for many requests on few cores.

Each gets its last token and at most one draft; what a row scores is the same as in a pass of its request alone, and so
is the text. B: requests, V: vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from edge.decoding.blocks import RowsBackend, Slot, Writing, advance, draw, keep
from edge.decoding.types import Floats, Ids
from shared.tokens import EOS

REQUESTS: Final = 4
"""Of a pass. Eight requests on two cores are four in each pass; of eight in a pass each would cost as much."""
ROWS: Final = 2
"""Of a request: its last token and a draft, or its last token twice. More drafts cost more than they bring."""


def share_of_a_lane(requests: int, lanes: int) -> int:
    """The most of them that a lane has when each has as many."""
    return -(-requests // lanes)


@dataclass(frozen=True)
class Seats:
    """What a pass reads and makes, in memory of its thread. order: which of the given slots sits at each place."""

    order: Sequence[int]
    tokens: Ids  # (B, 2)
    positions: Ids  # (B, 2)
    noise: Floats  # (B, 3, V), of the positions after each request's first row
    temperatures: Floats  # (B,), 0 where the best score is drawn
    scores: Floats  # (B, 2, V)
    drafts: Ids  # (B, 2), for the position after the next of each row


@runtime_checkable
class SharedRows(RowsBackend, Protocol):
    """A backend whose passes take rows of several requests."""

    batches: tuple[int, ...]
    """How many requests a pass takes, ascending from 1; 1 alone once `share_no_more` was called."""

    degraded: str | None
    """Why no pass is shared, where the bundle has a graph for it; None where all is well."""

    alone: str | None
    """Why no pass is shared though that graph runs; None otherwise."""

    def share_no_more(self, error: Exception) -> None:
        """A pass of several requests has failed with it: from now on there is none."""

    def seat(self, slots: Sequence[Slot]) -> Seats:
        """Places for the next pass of this thread, as many as one of `batches`, each slot where it was before."""

    def rows_together(self, seats: Seats) -> None:
        """One pass over two rows of each request, behind those kept in its slot; keeps none of them, as `rows`."""


def advance_together(backend: SharedRows, writings: Sequence[Writing], under_way: int = 1) -> None:
    """One pass of requests that have read their given text: each commits a token, and its draft if the law draws it.

    If it fails, each makes a pass of its own instead, as all do from then on. under_way: as in `advance`.
    """
    try:
        seats, seated = _scored(backend, writings)
        drawn_of = _draws(seats, seated)
    except Exception as error:  # runtimes raise types of their own; nothing is committed yet
        backend.share_no_more(error)
        for w in writings:
            advance(backend, w, under_way)
        return
    for place, (w, drawn) in enumerate(zip(seated, drawn_of, strict=True)):
        assert w.remaining is None
        agreed, is_open, _ = keep(w, drawn[: len(w.drafts) + 1])
        room = w.gaps[0][1] - w.position - 1 if is_open else 0  # the law draws a gap's last position by itself
        draft = int(seats.drafts[place, agreed])
        w.drafts = [draft] if min(w.law.window, room) > 0 and draft != EOS else []


def _scored(backend: SharedRows, writings: Sequence[Writing]) -> tuple[Seats, list[Writing]]:
    """Run the pass.  → its scores and drafts, the requests by their places"""
    seats = backend.seat([w.slot for w in writings if w.slot is not None])
    seated = [writings[i] for i in seats.order]
    for place, w in enumerate(seated):
        w.drafts = w.drafts[: ROWS - 1]
        last = w.pending[-1]
        seats.tokens[place] = last, *(w.drafts or [last])
        seats.positions[place] = w.position, w.position + len(w.drafts)
        seats.noise[place] = w.noise.of(w.position + 1, ROWS + 1)
        seats.temperatures[place] = 0 if w.law.top_k == 1 else w.law.temperature
    backend.rows_together(seats)
    return seats, seated


def _draws(seats: Seats, seated: Sequence[Writing]) -> list[list[int]]:
    """The tokens of each request's rows; of all in one go where their laws draw alike."""
    noise = seats.noise[:, :ROWS]
    if len({(w.law.temperature, w.law.top_k, w.law.top_p) for w in seated}) > 1:
        return [draw(seats.scores[i], noise[i], w.law).tolist() for i, w in enumerate(seated)]
    rows: list[list[int]] = draw(seats.scores, noise, seated[0].law).reshape(-1, ROWS).tolist()
    return rows
