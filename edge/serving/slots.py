"""Places for keys and values on a backend: bounded in number, and so in memory."""

import heapq
from dataclasses import dataclass, field
from typing import Final

from edge.decoding.blocks import AnyRows, Slot
from edge.system.locked import Locked

SLOTS: Final = 8
"""Requests that hold keys and values at once; the others wait for a place. 2.6 MB each in a `tiny` network."""


@dataclass
class _Pool:
    left: int  # that may still be made
    made: list[Slot] = field(default_factory=list)
    free: list[int] = field(default_factory=list)  # a heap of their numbers, in the order of making


class Slots:
    """A pool of slots, made when first needed. Thread-safe. A slot stays with its request until that is done."""

    def __init__(self, backend: AnyRows, most: int = SLOTS) -> None:
        self._backend = backend
        self._pool = Locked(_Pool(most))

    def take(self) -> Slot | None:
        """An empty slot, the first that is free: a GPU computes all up to the last taken. None when all are taken."""
        with self._pool as pool:
            if pool.free:
                return pool.made[heapq.heappop(pool.free)]
            if not pool.left:
                return None
            pool.made.append(self._backend.open_slot())
            pool.left -= 1
            return pool.made[-1]

    def give_back(self, slot: Slot) -> None:
        """The request is done, or given up; what it kept is overwritten by the next."""
        slot.cached, slot.condition = 0, None
        with self._pool as pool:
            heapq.heappush(pool.free, pool.made.index(slot))
