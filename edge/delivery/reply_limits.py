"""Limits for replies that anyone can trigger and that are stored nowhere: refusals, health, repeated answers."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from edge.system.locked import Locked

MAX_REPLIES: Final = 32
"""Replies in flight at once; beyond, those to QoS 0 requests are dropped."""
MAX_RELIABLE_REPLIES: Final = 1024
"""The same for QoS 1; beyond, a request is left with the broker, unacknowledged, until there is room.

A broker should deliver few at a time, but mosquitto 2.0 exceeds the Receive Maximum by far.
"""
BURST: Final = 50
RATE: Final = 20.0
"""Replies a second to QoS 0 requests of one client, after a burst."""
MAX_CLIENTS: Final = 256
"""Clients whose rate is tracked; the one quiet for longest is dropped."""


@dataclass
class _Spent:
    """The replies so far. left: whether a request was left with the broker. clients: client → (replies counted against
    its rate, when).
    """

    under_way: int = 0
    left: bool = False
    clients: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def within_rate(self, client: str) -> bool:
        """Whether a client's rate allows another reply, which is then counted."""
        now = time.monotonic()
        spent, since_s = self.clients.pop(client, (0.0, now))
        spent = max(0.0, spent - (now - since_s) * RATE)
        allowed = spent < BURST
        self.clients[client] = (spent + allowed, now)
        if len(self.clients) > MAX_CLIENTS:
            self.clients.popitem(last=False)
        return allowed


class ReplyLimits:
    """Decides which replies are sent. Thread-safe.

    on_drop: called for each that is not. on_room: called when there is room again for what was left with the broker.
    """

    def __init__(self, on_drop: Callable[[], None], on_room: Callable[[], None]) -> None:
        self._on_drop, self._on_room = on_drop, on_room
        self._spent = Locked(_Spent())

    def take(self, client: str, reliable: bool) -> bool:
        """Whether another reply may be sent; `give_back` ends it.

        reliable: the request came at QoS 1; refused, it must not be acknowledged, and comes again after `on_room`.
        """
        with self._spent as spent:
            if reliable:
                allowed = spent.under_way < MAX_RELIABLE_REPLIES
                spent.left |= not allowed
            else:
                allowed = spent.under_way < MAX_REPLIES and spent.within_rate(client)
            spent.under_way += allowed
        if not (allowed or reliable):
            self._on_drop()
        return allowed

    def drop(self) -> None:
        """Count a message that cannot be replied to at all."""
        self._on_drop()

    def give_back(self) -> None:
        """A reply was delivered or lost."""
        with self._spent as spent:
            spent.under_way -= 1
            room = spent.left and spent.under_way < MAX_REPLIES
            spent.left &= not room
        if room:
            self._on_room()
