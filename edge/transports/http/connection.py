"""One HTTP connection: bytes in, one request after another, bytes out, everything bounded in size and time.

h11 (RFC 9112) parses and frames. A request must arrive whole within REQUEST_S however it trickles; a client that takes
nothing for STALL_S is cut off, and so is one that stays idle. While a request is served, the end of the client's stream
counts as hanging up.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from email.utils import formatdate
from typing import Final, Protocol

import h11

from edge.transports.http.attaching import MESSAGE, Limit
from edge.transports.http.exchange import Exchange, Header, Request
from edge.transports.http.places import Pace, Places, unit
from shared.errors import RequestError

log = logging.getLogger(__name__)

MAX_HEAD_BYTES: Final = 16 * 1024
"""Request line and headers together."""
MAX_UNREAD_BYTES: Final = 64 * 1024
REQUEST_S: Final = 15.0
"""From the first byte of a request to its last."""
IDLE_S: Final = 75.0
"""Between two requests of a connection."""
STALL_S: Final = 20.0
"""How long a client may take nothing of what is sent to it."""
LINGER_S: Final = 2.0
"""How long a refused client may go on sending: closed at once, its own data would reset the answer away."""
ALWAYS: Final[tuple[Header, ...]] = (
    ("cache-control", "no-store"),
    ("x-content-type-options", "nosniff"),
    ("cross-origin-resource-policy", "same-origin"),
)


class Site(Protocol):
    """What connections are made for. Its methods are called in the event loop's thread."""

    places: "Places[Connection]"
    pace: Pace
    closing: bool

    def limit(self, head: Request) -> Limit:
        """Of the body of a request, of which the head has come. Raises RequestError."""

    def serve(self, request: Request, exchange: Exchange) -> None:
        """Answer a request, now or later. Raises RequestError."""

    def note(self, error: RequestError, unit: str) -> None:
        """Count a refusal."""


class Connection(asyncio.Protocol):
    """Serves one client. unit: see `places.unit`. used_s: when its last request came or was answered."""

    def __init__(self, site: Site) -> None:
        self.unit = ""
        self.used_s = time.monotonic()
        self._site = site
        self._loop = asyncio.get_running_loop()
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._timer: asyncio.TimerHandle | None = None  # ends waiting for the client
        self._stall: asyncio.TimerHandle | None = None
        self._written = 0
        self._head: Request | None = None  # without its body
        self._limit = MESSAGE
        self._body = bytearray()
        self._exchange: Exchange | None = None
        self._ended = False  # nothing more is read or begun
        self._eof = False  # the client sends no more
        self._full = False  # the client must take its answers before it gets more

    # --- asyncio.Protocol ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=MAX_UNREAD_BYTES)
        self.unit = unit(transport.get_extra_info("peername")[0])
        seated = self._site.places.enter(self)
        if seated:
            self._wait(IDLE_S, self._transport.close)
        elif seated is None:
            self._ended = True
            transport.abort()
        else:
            self._fail(RequestError("queue_full", "too many clients are connected, and none of them is idle"))

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        if self._ended:
            return
        if self._exchange is None and self._head is None and self._http.trailing_data[0] == b"":
            self._wait(REQUEST_S, self._too_slow)
        self._http.receive_data(data)
        if self._exchange is None:
            self._advance()
        else:
            self._transport.pause_reading()  # a request ahead of its turn waits in the kernel

    def eof_received(self) -> bool:
        """The client sends no more: half a request is refused, and a request that is being served has lost its client.

        Returns whether an answer is still to go.
        """
        self._eof = True
        if self._exchange is not None or self._ended:
            self._hung_up()
            return False
        self._http.receive_data(b"")
        self._advance()
        return self._exchange is not None

    def pause_writing(self) -> None:
        """The client leaves too much unread: it is served again once it has read on."""
        self._full = True

    def resume_writing(self) -> None:
        """It has read on."""
        self._full = False
        self._advance()

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is gone."""
        self._hung_up()
        self._ended = True
        self._site.places.leave(self)
        for timer in (self._timer, self._stall):
            if timer is not None:
                timer.cancel()

    # --- what the server does -----------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether no request is being served. One that has come in part does not count."""
        return self._exchange is None

    @property
    def uploading(self) -> bool:
        """Whether an attachment is coming in."""
        return self._head is not None and self._exchange is None and self._limit is not MESSAGE

    def make_way(self) -> None:
        """Hang up, with a word if a request has begun to come."""
        if self._head is None:
            self._ended = True
            self._transport.close()
        elif not self._ended:
            self._fail(RequestError("queue_full", "this connection was slow, and another client needed its place"))

    def abort(self) -> None:
        """Hang up at once."""
        self._transport.abort()

    @property
    def flushed(self) -> bool:
        """Whether no answer is under way."""
        return self._exchange is None and not self.unsent

    # --- a request comes ----------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Read events until a request is whole, or more bytes are needed."""
        try:
            while not self._ended and not self._full and self._exchange is None:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    if self._http.they_are_waiting_for_100_continue:
                        self._send(h11.InformationalResponse(status_code=100, headers=[]))
                    return
                if isinstance(event, h11.Request):
                    self._begin(event)
                elif isinstance(event, h11.Data):
                    self._take(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    self._serve()
                else:  # PAUSED, or the end of the connection
                    return
        except h11.RemoteProtocolError as error:
            refusal = RequestError("bad_request", f"this is not HTTP: {error}")
            if error.error_status_hint == 431:
                refusal = RequestError("headers_too_large", f"request line and headers may have {MAX_HEAD_BYTES} bytes")
            self._fail(refusal)
        except RequestError as error:
            self._fail(error)

    def _begin(self, head: h11.Request) -> None:
        self._limit = MESSAGE
        self._head = Request(
            method=head.method.decode("ascii"),
            path=head.target.decode("ascii").partition("?")[0],
            headers={name.decode("ascii"): value.decode("latin-1") for name, value in head.headers},
            body=b"",
            unit=self.unit,
        )
        self._limit = self._site.limit(self._head)
        self._limit.check(int(self._head.headers.get("content-length", 0)), whole=True)

    def _take(self, data: bytes) -> None:
        self._limit.check(len(self._body) + len(data), whole=False)
        self._body += data

    def _serve(self) -> None:
        self._wait(None, lambda: None)
        assert self._head is not None
        request = replace(self._head, body=bytes(self._body))
        self._body.clear()
        self._exchange = exchange = Exchange(self)
        self.used_s = time.monotonic()
        try:
            self._site.serve(request, exchange)
        except RequestError as error:
            self._site.note(error, self.unit)
            exchange.refuse(error)
        except Exception:
            log.exception("an HTTP request could not be served")
            exchange.refuse(RequestError("internal", "the daemon failed on this request; its log has the details"))

    def _too_slow(self) -> None:
        self._fail(RequestError("too_slow", f"a request must come whole within {REQUEST_S:.0f} s"))

    def _fail(self, error: RequestError) -> None:
        """Refuse what comes and hang up: where the next request begins cannot be known."""
        self._site.note(error, self.unit)
        self._ended = True
        self._exchange = Exchange(self)
        self._exchange.refuse(error)

    def _hung_up(self) -> None:
        if self._exchange is not None:
            self._exchange.gone = True

    # --- an answer goes (Carrier) -------------------------------------------------------------------------------------

    @property
    def unsent(self) -> int:
        """Bytes that the client has not taken yet."""
        return self._transport.get_write_buffer_size()

    def send_later(self, exchange: Exchange, error: RequestError) -> None:
        """Send an error as soon as this client may be refused again."""
        delay_s = self._site.pace.delay_s(self.unit)
        if delay_s:
            self._loop.call_later(delay_s, exchange.send_error, error)
        else:
            exchange.send_error(error)

    def send_head(self, status: int, headers: Iterable[Header]) -> None:
        """Begin an answer."""
        close = [("connection", "close")] if self._ended or self._site.closing else []
        dated = ("date", formatdate(usegmt=True))
        self._send(h11.Response(status_code=status, headers=[dated, *headers, *ALWAYS, *close]))

    def send_data(self, data: bytes) -> None:
        """A piece of its body, which an answer to HEAD has not."""
        if self._head is None or self._head.method != "HEAD":
            self._send(h11.Data(data=data))

    def send_end(self) -> None:
        """The answer is complete: wait for the next request, or hang up."""
        self._send(h11.EndOfMessage())
        self._exchange = self._head = None
        self.used_s = time.monotonic()
        if self._ended or self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            self._hang_up()
            return
        self._http.start_next_cycle()
        if self._http.trailing_data[0]:
            self._wait(REQUEST_S, self._too_slow)
        else:
            self._wait(IDLE_S, self._transport.close)
        self._transport.resume_reading()
        self._loop.call_soon(self._advance)

    def _send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if not data or self._transport.is_closing():
            return
        self._transport.write(data)
        self._written += len(data)
        if self.unsent and self._stall is None:
            self._stall = self._loop.call_later(STALL_S, self._check_stall, self._written)

    def _check_stall(self, due: int) -> None:
        """Cut off a client that has not taken what was sent STALL_S ago. due: bytes sent by then."""
        self._stall = None
        if self._written - self.unsent < due:
            self._transport.abort()
        elif self.unsent:
            self._stall = self._loop.call_later(STALL_S, self._check_stall, self._written)

    def _hang_up(self) -> None:
        self._ended = True
        if self._transport.is_closing():
            return
        if self._eof:
            self._transport.close()
            return
        self._transport.resume_reading()
        with suppress(OSError):  # the client has reset the connection
            self._transport.write_eof()
        self._wait(LINGER_S, self._linger_over)

    def _linger_over(self) -> None:
        if self.unsent:
            self._wait(LINGER_S, self._linger_over)  # STALL_S bounds it
        else:
            self._transport.abort()

    def _wait(self, seconds: float | None, then: Callable[[], object]) -> None:
        """Wait for the client so long at most. None: no longer."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self._loop.call_later(seconds, then)
