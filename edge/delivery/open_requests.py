"""Requests without an answer, accepted or still being checked, and their senders."""

from collections.abc import Callable
from dataclasses import dataclass, field

from edge.system.locked import Locked
from shared.errors import RequestError


@dataclass(frozen=True)
class Sender:
    """Who sent a request, and where its answer goes.

    client: unit of fair queueing and namespace of ids: a name, or, for a request on a plain topic, the first levels of
    its reply topic, which contain a `/`. reliable: sent at QoS 1, so the broker keeps it until `acknowledge` is called,
    and delivers few others before. pooled: sent to a pool of devices, of which one answers.
    """

    client: str
    address: str
    correlation: bytes | None
    reliable: bool
    acknowledge: Callable[[], None]
    pooled: bool = False


@dataclass(eq=False)
class OpenRequest:
    """A request without an answer. again: acknowledge its repeats, once it is accepted or refused."""

    client: str
    address: str
    id: str | None
    correlation: bytes | None
    payload_sha256: bytes = b""
    cancelled: bool = False
    again: list[Callable[[], None]] = field(default_factory=list)


@dataclass
class _Requests:
    """accepted: by number in the journal. arriving: while their conditions are read."""

    accepted: dict[int, OpenRequest] = field(default_factory=dict)
    arriving: list[OpenRequest] = field(default_factory=list)


class OpenRequests:
    """Requests without an answer. Thread-safe."""

    def __init__(self) -> None:
        self._requests = Locked(_Requests())

    def arrive(self, opened: OpenRequest, acknowledge: Callable[[], None]) -> OpenRequest | None:
        """Note a request that is being checked, unless another of its identity is.  → that one

        acknowledge: called along with that one's, if both are the same request.
        """
        with self._requests as requests:
            for other in requests.arriving:
                same = (other.client, other.address, other.id) == (opened.client, opened.address, opened.id)
                if same and opened.id is not None:
                    if other.payload_sha256 == opened.payload_sha256:
                        other.again.append(acknowledge)
                    return other
            requests.arriving.append(opened)
            return None

    def leave(self, opened: OpenRequest) -> list[Callable[[], None]]:
        """It is not accepted.  → what to acknowledge beside it"""
        with self._requests as requests:
            requests.arriving.remove(opened)
            return opened.again

    def add(self, seq: int, opened: OpenRequest) -> list[Callable[[], None]]:
        """Note a request that was accepted.  → what to acknowledge beside it"""
        with self._requests as requests:
            if opened in requests.arriving:
                requests.arriving.remove(opened)
            requests.accepted[seq] = opened
            return opened.again

    def get(self, seq: int) -> OpenRequest | None:
        """The request of that number, if it is without an answer."""
        with self._requests as requests:
            return requests.accepted.get(seq)

    def remove(self, seq: int) -> None:
        """Its answer is stored."""
        with self._requests as requests:
            requests.accepted.pop(seq, None)

    def cancel(self, client: str | None, address: str | None, id: str) -> None:
        """Cancel requests by id. client: None for senders on plain topics. address: only those answered there."""
        with self._requests as requests:
            for opened in (*requests.accepted.values(), *requests.arriving):
                sender = "/" in opened.client if client is None else opened.client == client
                opened.cancelled |= opened.id == id and sender and address in (None, opened.address)


def conflict(id: str | None) -> RequestError:
    """The refusal of a request under an id that means another."""
    return RequestError("conflict", f"`id` {id!r} was given to another request before; each needs its own")
