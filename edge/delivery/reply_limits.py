"""How much a stranger may make the daemon say that is kept nowhere: refusals, health, answers sent again."""

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from edge.system.locked import Locked

MAX_REPLIES: Final = 32
"""Replies under way at once before those to QoS 0 requests are dropped."""
MAX_RELIABLE_REPLIES: Final = 1024
"""The same for QoS 1. A broker is to hand on few at a time, but mosquitto 2.0 goes beyond the Receive Maximum."""
BURST: Final = 50
RATE: Final = 20.0
"""Replies a second to QoS 0 requests of one client, after a burst."""
MAX_CLIENTS: Final = 256
"""Clients whose rate is remembered; the one that was quiet longest is forgotten."""


@dataclass
class _Spent:
    """What was replied so far. clients: client → (replies against its rate, as of when)."""

    dropped: int = 0
    under_way: int = 0
    clients: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def within_rate(self, client: str) -> bool:
        """Count one reply more to a client against its rate."""
        now = time.monotonic()
        spent, since_s = self.clients.pop(client, (0.0, now))
        spent = max(0.0, spent - (now - since_s) * RATE)
        allowed = spent < BURST
        self.clients[client] = (spent + allowed, now)
        if len(self.clients) > MAX_CLIENTS:
            self.clients.popitem(last=False)
        return allowed


class ReplyLimits:
    """Who may still be replied to. Thread-safe."""

    def __init__(self) -> None:
        self._spent = Locked(_Spent())

    @property
    def dropped(self) -> int:
        """Replies that were not sent."""
        with self._spent as spent:
            return spent.dropped

    def take(self, client: str, reliable: bool) -> bool:
        """Whether there is room for one reply more, which `give_back` ends.

        reliable: the request came at QoS 1.
        """
        with self._spent as spent:
            if reliable:
                allowed = spent.under_way < MAX_RELIABLE_REPLIES
            else:
                allowed = spent.under_way < MAX_REPLIES and spent.within_rate(client)
            spent.under_way += allowed
            spent.dropped += not allowed
            return allowed

    def drop(self) -> None:
        """Count what cannot be replied to at all."""
        with self._spent as spent:
            spent.dropped += 1

    def give_back(self) -> None:
        """A reply arrived, or never will."""
        with self._spent as spent:
            spent.under_way -= 1
