"""How much a stranger may make the daemon say that is kept nowhere: refusals, health, answers sent again."""

import threading
import time
from collections import OrderedDict
from typing import Final

MAX_REPLIES: Final = 32
"""Replies under way at once before those to QoS 0 requests are dropped."""
MAX_RELIABLE_REPLIES: Final = 1024
"""The same for QoS 1. A broker is to hand on few at a time, but mosquitto 2.0 goes beyond the Receive Maximum."""
BURST: Final = 50
RATE: Final = 20.0
"""Replies a second to QoS 0 requests of one client, after a burst."""
MAX_CLIENTS: Final = 256
"""Clients whose rate is remembered; the one that was quiet longest is forgotten."""


class ReplyLimits:
    """Who may still be replied to. Thread-safe. dropped: replies that were not sent."""

    def __init__(self) -> None:
        self.dropped = 0
        self._lock = threading.Lock()
        self._under_way = 0
        self._spent: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client → (replies, as of when)

    def take(self, client: str, reliable: bool) -> bool:
        """Whether there is room for one reply more, which `give_back` ends.

        reliable: the request came at QoS 1.
        """
        with self._lock:
            if reliable:
                allowed = self._under_way < MAX_RELIABLE_REPLIES
            else:
                allowed = self._under_way < MAX_REPLIES and self._within_rate(client)
            self._under_way += allowed
            self.dropped += not allowed
            return allowed

    def drop(self) -> None:
        """Count what cannot be replied to at all."""
        with self._lock:
            self.dropped += 1

    def give_back(self) -> None:
        """A reply arrived, or never will."""
        with self._lock:
            self._under_way -= 1

    def _within_rate(self, client: str) -> bool:
        now = time.monotonic()
        spent, since_s = self._spent.pop(client, (0.0, now))
        spent = max(0.0, spent - (now - since_s) * RATE)
        allowed = spent < BURST
        self._spent[client] = (spent + allowed, now)
        if len(self._spent) > MAX_CLIENTS:
            self._spent.popitem(last=False)
        return allowed
