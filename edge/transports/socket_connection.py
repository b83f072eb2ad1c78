"""One client of the Unix socket: bytes in, bytes out, and whether it is still there."""

import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from edge.serving.scheduler import Scheduler
from edge.system.locked import Locked
from shared.errors import RequestError
from shared.messages import (
    MAX_MESSAGE_BYTES,
    CancelRequest,
    HealthRequest,
    Partial,
    Reply,
    Response,
    decode_line,
    encode,
    error_response,
    id_of,
)

MAX_UNREAD_BYTES: Final = 256 * 1024
"""A client that leaves this much unread is served again once it has read on."""


@dataclass(eq=False)
class _Request:
    """A request in progress."""

    id: str | None
    cancelled: bool = False


@dataclass
class _Outgoing:
    """The socket's writing side. unsent: bytes that the client has not taken yet."""

    sock: socket.socket
    unsent: bytearray = field(default_factory=bytearray)


class _Sender:
    """Sends replies to a client, from any thread. gone: either side has closed."""

    def __init__(self, sock: socket.socket) -> None:
        self.gone = False
        self._outgoing = Locked(_Outgoing(sock))

    @property
    def unsent(self) -> int:
        """Bytes that the client has not taken yet."""
        with self._outgoing as outgoing:
            return len(outgoing.unsent)

    def send(self, reply: Reply) -> None:
        """Send as much as the client takes now. A snapshot is left out while anything is unsent."""
        with self._outgoing as outgoing:
            if isinstance(reply, Partial) and outgoing.unsent:
                return
            outgoing.unsent += encode(reply) + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what the client takes now."""
        with self._outgoing as outgoing:
            try:
                while outgoing.unsent and not self.gone:
                    del outgoing.unsent[: outgoing.sock.send(outgoing.unsent)]
            except BlockingIOError:
                pass
            except OSError:
                self.gone = True

    def close(self) -> None:
        """Hang up; replies still to come are dropped."""
        with self._outgoing as outgoing:
            self.gone = True
            outgoing.sock.close()


class Connection:
    """Serves what a client sends, line by line, in the polling thread; replies may come from others.

    uid: its user. name: for the log and the fair queue. wake: wakes the polling thread up.
    """

    def __init__(
        self, sock: socket.socket, scheduler: Scheduler, *, uid: int, name: str, wake: Callable[[], None]
    ) -> None:
        sock.setblocking(False)
        self.uid = uid
        self.used_s = time.monotonic()
        """When it last sent or received anything."""
        self._name = name
        self._sock = sock
        self._scheduler = scheduler
        self._wake = wake
        self._ended = False  # nothing more is read: after the client's last line, or one that was too long
        self._unserved = bytearray()
        self._requests: Locked[set[_Request]] = Locked(set())
        self._sender = _Sender(sock)

    @property
    def events(self) -> int:
        """Events to poll for; a hang-up is always reported."""
        reads = not self._ended and self._sender.unsent < MAX_UNREAD_BYTES and len(self._unserved) <= MAX_MESSAGE_BYTES
        return (select.POLLIN if reads else 0) | (select.POLLOUT if self._sender.unsent else 0)

    @property
    def flushed(self) -> bool:
        """Whether all replies are sent."""
        return self._sender.gone or not self._sender.unsent

    @property
    def idle(self) -> bool:
        """Whether no request is in progress. Unread replies and an incomplete line do not count."""
        with self._requests as requests:
            return not requests

    @property
    def gone(self) -> bool:
        """Whether the connection has ended: its requests are then cancelled."""
        return self._sender.gone

    @gone.setter
    def gone(self, gone: bool) -> None:
        self._sender.gone = gone

    @property
    def finished(self) -> bool:
        """Whether all requests are answered and no more can come."""
        return self._sender.gone or (self._ended and not self._unserved and self.flushed and self.idle)

    def receive(self) -> None:
        """Read available bytes. The last line needs no newline when the client shuts its writing side down."""
        try:
            data = self._sock.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._sender.gone = True
            return
        self._unserved += data
        if not data:
            self._ended = True
            self._unserved += b"\n" if self._unserved else b""

    def answer_line(self) -> bool:
        """Serve one complete line, if there is one and the client reads its replies.  → whether there was one

        Only one, so that a client that sends thousands delays no other.
        """
        if self._sender.gone or self._sender.unsent >= MAX_UNREAD_BYTES:
            return False
        end = self._unserved.find(b"\n")
        line = bytes(self._unserved[:end] if end >= 0 else self._unserved)
        if len(line) > MAX_MESSAGE_BYTES:
            self._ended = True  # the next line cannot be located: answer, then close
            self._unserved.clear()
        elif end < 0:
            return False
        else:
            del self._unserved[: end + 1]
        if line.strip():
            self.used_s = time.monotonic()
            self._answer(line)
        return True

    def flush(self) -> None:
        """Send what the client takes now."""
        self._sender.flush()

    def refuse(self, error: RequestError, id: str | None = None) -> None:
        """Reply with an error to a line, or to the client as a whole."""
        self._scheduler.requests.note(code=error.code, id=id, client=self._name)
        self._sender.send(error_response(error, id))

    def close(self) -> None:
        """Hang up."""
        self._sender.close()

    def _answer(self, line: bytes) -> None:
        try:
            message = decode_line(line)
            if not isinstance(message, HealthRequest) and message.response_topic is not None:
                raise RequestError(
                    "bad_request", "`response_topic` is for MQTT: on the socket the answer comes back on the connection"
                )
        except RequestError as error:
            self.refuse(error, id_of(line))
            return
        if isinstance(message, HealthRequest):
            self._sender.send(self._scheduler.health())
            return
        if isinstance(message, CancelRequest):
            with self._requests as requests:
                for request in requests:
                    request.cancelled |= request.id == message.id
            return
        request = _Request(message.id)
        with self._requests as requests:
            requests.add(request)
        self._scheduler.submit(
            message,
            lambda reply: self._reply(request, reply),
            gone=lambda: request.cancelled or self._sender.gone,
            client=self._name,
        )

    def _reply(self, request: _Request, reply: Reply) -> None:
        self._sender.send(reply)
        self.used_s = time.monotonic()
        if isinstance(reply, Response):
            with self._requests as requests:
                requests.discard(request)
        if self._sender.unsent or self._unserved or self._ended:
            self._wake()
