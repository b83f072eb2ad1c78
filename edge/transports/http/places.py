"""How many connections there may be, and how fast one address is refused: what a stranger can take is bounded."""

import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Final, Generic, Protocol, TypeVar

MAX_CONNECTIONS: Final = 256
ADDRESS_CONNECTIONS: Final = 64
"""Most connections of one address."""
MAX_TURNED_AWAY: Final = 128
"""Connections above these limits that are refused with an answer; more are cut off without one."""
BURST: Final = 50
RATE: Final = 20.0
"""Refusals a second to one address, after a burst; further ones are sent late, and their connection waits."""
MAX_ADDRESSES: Final = 1024
"""Addresses whose refusals are counted; the one quiet for longest is dropped."""


def unit(address: str) -> str:
    """What counts as one client: an IPv4 address, or an IPv6 network of 64 bits, of which every host has plenty."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            return str(ip if ip.is_loopback else ipaddress.ip_network((ip, 64), strict=False))
        ip = ip.ipv4_mapped
    return str(ip)


class Guest(Protocol):
    """A connection. unit: whose it is. used_s: when it last sent or received anything."""

    unit: str
    used_s: float

    @property
    def idle(self) -> bool:
        """Whether no request of it is being served."""

    def make_way(self) -> None:
        """Hang up: another client needs its place."""


G = TypeVar("G", bound=Guest)


class Places(Generic[G]):
    """The connections that have a place, and those that are being turned away. Not thread-safe."""

    def __init__(self) -> None:
        self._seated: set[G] = set()
        self._turned_away: set[G] = set()

    def __iter__(self) -> Iterator[G]:
        return iter([*self._seated, *self._turned_away])

    def __len__(self) -> int:
        return len(self._seated)

    def enter(self, guest: G) -> bool | None:
        """Whether there is a place, if need be that of an idle connection; None where not even a refusal is possible.

        The address that is above its share gives one up; above the limit of all, the address that holds most.
        """
        held = Counter(other.unit for other in self._seated)
        loser = None
        if held[guest.unit] >= ADDRESS_CONNECTIONS:
            loser = guest.unit
        elif len(self._seated) >= MAX_CONNECTIONS:
            loser = held.most_common(1)[0][0]
        if loser is not None:
            idle = [other for other in self._seated if other.unit == loser and other.idle]
            if not idle:
                if len(self._turned_away) >= MAX_TURNED_AWAY:
                    return None
                self._turned_away.add(guest)
                return False
            longest = min(idle, key=lambda other: other.used_s)
            self._seated.discard(longest)
            longest.make_way()
        self._seated.add(guest)
        return True

    def leave(self, guest: G) -> None:
        """A connection has ended."""
        self._seated.discard(guest)
        self._turned_away.discard(guest)


class Pace:
    """How long the next refusal to an address must wait (the generic cell rate algorithm). Not thread-safe."""

    def __init__(self) -> None:
        self._due_s: OrderedDict[str, float] = OrderedDict()

    def delay_s(self, unit: str) -> float:
        """Count a refusal.  → seconds until it may be sent"""
        now = time.monotonic()
        due_s = max(now, self._due_s.pop(unit, now)) + 1 / RATE
        self._due_s[unit] = due_s
        if len(self._due_s) > MAX_ADDRESSES:
            self._due_s.popitem(last=False)
        return max(0.0, due_s - now - BURST / RATE)
