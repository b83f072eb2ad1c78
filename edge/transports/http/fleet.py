"""`GET /fleet`: all devices of the broker, for as many as may read it at once."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from edge.transports.http.exchange import Exchange
from shared.errors import RequestError

MAX_READERS: Final = 16
"""Who may wait for an answer, or for its last byte: one has up to 2 MB."""


class FleetSource(Protocol):
    """Knows the devices."""

    def ask(self, reader: Callable[[bytes | RequestError], None]) -> None:
        """Call `reader` with them as JSON, in any thread, or with an error. Raises RequestError."""

    def close(self) -> None:
        """Call no reader any more; bounded in time."""


class FleetReaders:
    """Readers of the fleet; for the event loop's thread. source: None without a broker. known: there is one."""

    def __init__(self, source: FleetSource | None) -> None:
        self._source = source
        self.known = source is not None
        self._readers: list[Exchange] = []

    def serve(self, exchange: Exchange) -> None:
        """Answer one of them, soon. Raises RequestError."""
        if self._source is None:
            raise RequestError("not_found", "this device has no broker, and so knows no others: set `mqtt.host`")
        self._readers = [r for r in self._readers if not r.gone and (not r.begun or r.unsent)]
        if len(self._readers) >= MAX_READERS:
            raise RequestError("queue_full", f"{MAX_READERS} clients read the fleet at this moment", 1000)
        loop = asyncio.get_running_loop()

        def tell(answer: bytes | RequestError) -> None:
            with suppress(RuntimeError):  # the loop has ended: the daemon stops
                if isinstance(answer, RequestError):
                    loop.call_soon_threadsafe(exchange.refuse, answer)
                else:
                    loop.call_soon_threadsafe(exchange.answer, answer)

        self._source.ask(tell)
        self._readers.append(exchange)

    def close(self) -> None:
        """Leave the broker."""
        if self._source is not None:
            self._source.close()
