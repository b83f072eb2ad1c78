"""Places for keys and values on a backend: bounded in number, and so in memory."""

import heapq
from collections import Counter
from dataclasses import dataclass, field

from edge.decoding.blocks import SLOTS, AnyRows, Slot
from edge.system.locked import Locked


@dataclass
class _Pool:
    left: int  # that may still be made
    made: list[Slot] = field(default_factory=list)
    free: list[int] = field(default_factory=list)  # a heap of their numbers, in the order of making
    held: Counter[str] = field(default_factory=Counter)  # by client


class Slots:
    """A pool of slots, made when first needed. Thread-safe. A slot stays with its request until that is done.

    So that no client waits for a whole text of another, a client holds half of them at most, or as many as the backend
    computes at once if these are more, and never all.
    """

    def __init__(self, backend: AnyRows, most: int = SLOTS) -> None:
        self._backend = backend
        at_once = max([backend.lanes, *getattr(backend, "batches", [])])
        self._each = max(1, most // 2, min(at_once, most - 1))
        self._pool = Locked(_Pool(most))

    def take(self, client: str = "") -> Slot | None:
        """An empty slot, the first that is free: a GPU computes all up to the last taken.

        None when all are taken, or the client has its share.
        """
        with self._pool as pool:
            if pool.held[client] >= self._each or not (pool.free or pool.left):
                return None
            pool.held[client] += 1
            if pool.free:
                return pool.made[heapq.heappop(pool.free)]
            pool.made.append(self._backend.open_slot())
            pool.left -= 1
            return pool.made[-1]

    def give_back(self, slot: Slot, client: str = "") -> None:
        """The request is done, or given up; what it kept is overwritten by the next."""
        slot.cached, slot.condition = 0, None
        with self._pool as pool:
            heapq.heappush(pool.free, pool.made.index(slot))
            pool.held[client] -= 1
            pool.held = +pool.held  # drops zero counts
