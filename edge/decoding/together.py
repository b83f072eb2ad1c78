"""Passes by blocks of several requests, whose rows share the products: for many requests on few cores.

What a row scores is the same as in a pass of its request alone, and so is the text.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from edge.decoding.blocks import RowsBackend, Writing


def share_of_a_lane(requests: int, lanes: int) -> int:
    """The most of them that a lane has when each has as many."""
    return -(-requests // lanes)


@runtime_checkable
class SharedRows(RowsBackend, Protocol):
    """A backend on the CPU whose passes take rows of several requests."""

    batches: tuple[int, ...]
    """How many requests a pass takes, ascending from 1."""

    def advance(self, writings: Sequence[Writing], under_way: int = 1) -> None:
        """One pass of each, as `edge.decoding.blocks.advance` makes it. One that reads a condition is alone.

        Where it raises, nothing is committed.
        """
