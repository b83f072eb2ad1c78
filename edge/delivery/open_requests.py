"""Accepted requests that have no answer yet, and their senders."""

from collections.abc import Callable
from dataclasses import dataclass

from edge.system.locked import Locked


@dataclass(frozen=True)
class Sender:
    """Who sent a request, and where its answer goes.

    client: unit of fair queueing and namespace of ids: a name, or, for a request on a plain topic, the first levels of
    its reply topic, which contain a `/`. reliable: sent at QoS 1, so the broker keeps it until `acknowledge` is called,
    and delivers few others before.
    """

    client: str
    address: str
    correlation: bytes | None
    reliable: bool
    acknowledge: Callable[[], None]


@dataclass(eq=False)
class OpenRequest:
    """An accepted request without an answer."""

    client: str
    address: str
    id: str | None
    correlation: bytes | None
    cancelled: bool = False


class OpenRequests:
    """Accepted requests without an answer, by number in the journal. Thread-safe."""

    def __init__(self) -> None:
        self._requests: Locked[dict[int, OpenRequest]] = Locked({})

    def add(self, seq: int, opened: OpenRequest) -> None:
        """Note a request that was accepted."""
        with self._requests as requests:
            requests[seq] = opened

    def get(self, seq: int) -> OpenRequest | None:
        """The request of that number, if it is without an answer."""
        with self._requests as requests:
            return requests.get(seq)

    def remove(self, seq: int) -> None:
        """Its answer is stored."""
        with self._requests as requests:
            requests.pop(seq, None)

    def cancel(self, client: str | None, address: str | None, id: str) -> None:
        """Cancel requests by id. client: None for senders on plain topics. address: only those answered there."""
        with self._requests as requests:
            for opened in requests.values():
                sender = "/" in opened.client if client is None else opened.client == client
                opened.cancelled |= opened.id == id and sender and address in (None, opened.address)
