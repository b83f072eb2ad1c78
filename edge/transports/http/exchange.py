"""One request and its answer: what handlers see of a connection."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from edge.transports.http.errors import error_body, error_headers
from shared.errors import ERROR_CODES, RequestError

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
Header = tuple[str, str]


@dataclass(frozen=True)
class Request:
    """A request that has arrived whole. headers: by lower-case name. unit: the client's address; see `places.unit`."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    unit: str


class Carrier(Protocol):
    """The connection under an exchange."""

    @property
    def unsent(self) -> int:
        """Bytes that the client has not taken yet."""

    def send_head(self, status: int, headers: Iterable[Header]) -> None:
        """Begin the answer."""

    def send_data(self, data: bytes) -> None:
        """A piece of its body."""

    def send_end(self) -> None:
        """The answer is complete; the next request may come."""

    def send_later(self, exchange: "Exchange", error: RequestError) -> None:
        """Call `exchange.send_error` as soon as its client may be refused again."""


class Exchange:
    """The answer to one request. For the event loop's thread, but for `gone`.

    gone: whether the client has hung up; nothing is sent any more. begun: whether the head is sent.
    """

    def __init__(self, carrier: Carrier) -> None:
        self.gone = False
        self.begun = False
        self._carrier = carrier

    @property
    def unsent(self) -> int:
        """Bytes that the client has not taken yet."""
        return self._carrier.unsent

    def answer(self, body: bytes, *, status: int = 200, kind: str = JSON, headers: Iterable[Header] = ()) -> None:
        """Send a whole answer."""
        if self.gone:
            return
        self.begun = True
        self._carrier.send_head(status, [("content-type", kind), ("content-length", str(len(body))), *headers])
        self._carrier.send_data(body)
        self._carrier.send_end()

    def write(self, data: bytes) -> None:
        """Send a piece of an event stream, which the first piece begins."""
        if self.gone:
            return
        if not self.begun:
            self.begun = True
            # For a proxy: nginx collects an answer before it hands it on, unless it is asked not to.
            self._carrier.send_head(200, [("content-type", EVENTS), ("x-accel-buffering", "no")])
        self._carrier.send_data(data)

    def end(self) -> None:
        """The event stream is complete."""
        if not self.gone:
            self._carrier.send_end()

    def refuse(self, error: RequestError) -> None:
        """Answer with an error, once this client may be refused again."""
        if not self.gone:
            self._carrier.send_later(self, error)

    def send_error(self, error: RequestError) -> None:
        """Answer with an error now."""
        self.answer(error_body(error), status=ERROR_CODES[error.code][0], headers=error_headers(error))
