"""The Unix socket: one JSON object a line both ways, several requests of a connection in flight at once.

One thread polls every connection, because an asyncio loop costs 10 MB and 40 ms of the start. Replies come from the
scheduler's thread, which sends them itself when the client keeps up, so that an answer waits for no other thread.
"""

import logging
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge.client import connect
from edge.serving.scheduler import Scheduler
from edge.transports.peer_credentials import group_id, is_member
from shared.errors import ConfigError, RequestError
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

log = logging.getLogger("edgelm")

MAX_CONNECTIONS: Final = 64
OUTBOX_BYTES: Final = 256 * 1024
"""A client that leaves this much unread is not served either, until it catches up."""
FLUSH_S: Final = 2.0
"""How long closing waits for clients to take their last replies."""
ACCEPT_PAUSE_S: Final = 0.1
HANG_UP: Final = select.POLLHUP | select.POLLERR | select.POLLNVAL


@dataclass(eq=False)
class _Asked:
    """A request in flight."""

    id: str | None
    cancelled: bool = False


class _Connection:
    """One client: bytes in, bytes out, and whether it is still there. wake: has the polling thread look again."""

    def __init__(self, sock: socket.socket, scheduler: Scheduler, wake: Callable[[], None]) -> None:
        sock.setblocking(False)
        self.gone = False  # the client closed, or we did: its requests are cancelled
        self._ended = False  # nothing more is read: the client sent its last line, or one that was too long
        self._sock = sock
        self._scheduler = scheduler
        self._wake = wake
        self._inbox = bytearray()  # the polling thread's alone
        self._lock = threading.Lock()  # guards the two below and the sending
        self._outbox = bytearray()
        self._in_flight: set[_Asked] = set()

    @property
    def events(self) -> int:
        """What to poll for; a hang-up is told in any case."""
        reads = not self._ended and len(self._outbox) < OUTBOX_BYTES and len(self._inbox) <= MAX_MESSAGE_BYTES
        return (select.POLLIN if reads else 0) | (select.POLLOUT if self._outbox else 0)

    @property
    def flushed(self) -> bool:
        """Whether no reply waits to be sent."""
        return self.gone or not self._outbox

    @property
    def finished(self) -> bool:
        """Whether all that was asked is answered, and nothing more will be asked."""
        with self._lock:
            return self.gone or (self._ended and not self._inbox and not self._outbox and not self._in_flight)

    def receive(self) -> None:
        """Read what is there. The last line needs no newline when the client shuts its writing side."""
        try:
            data = self._sock.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self.gone = True
            return
        self._inbox += data
        if not data:
            self._ended = True
            self._inbox += b"\n" if self._inbox else b""

    def answer_line(self) -> bool:
        """Serve one complete line, if there is one and the client takes its replies.  → whether there was one

        One: a client that sends thousands at once holds nobody up.
        """
        if self.gone or len(self._outbox) >= OUTBOX_BYTES:
            return False
        end = self._inbox.find(b"\n")
        line = bytes(self._inbox[:end] if end >= 0 else self._inbox)
        if len(line) > MAX_MESSAGE_BYTES:
            self._ended = True  # where the next line begins is anyone's guess: answer, then close
            self._inbox.clear()
        elif end < 0:
            return False
        else:
            del self._inbox[: end + 1]
        if line.strip():
            self._answer(line)
        return True

    def _answer(self, line: bytes) -> None:
        try:
            request = decode_line(line)
            if not isinstance(request, HealthRequest) and request.response_topic is not None:
                raise RequestError("bad_request", "`response_topic` is for MQTT: here the answer takes the way back")
        except RequestError as error:
            self._send(error_response(error, id_of(line)))
            return
        if isinstance(request, HealthRequest):
            self._send(self._scheduler.health())
            return
        with self._lock:
            if isinstance(request, CancelRequest):
                for asked in self._in_flight:
                    asked.cancelled |= asked.id == request.id
                return
            asked = _Asked(request.id)
            self._in_flight.add(asked)
        client = f"socket {id(self)}"
        self._scheduler.submit(
            request, lambda reply: self._reply(asked, reply), lambda: asked.cancelled or self.gone, client
        )

    def _reply(self, asked: _Asked, reply: Reply) -> None:
        self._send(reply)
        if isinstance(reply, Response):
            with self._lock:
                self._in_flight.discard(asked)
        if self._outbox or self._inbox or self._ended:
            self._wake()

    def _send(self, reply: Reply) -> None:
        with self._lock:
            if isinstance(reply, Partial) and self._outbox:
                return  # the client is behind: a newer snapshot will serve it better
            self._outbox += encode(reply) + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what the client takes now."""
        with self._lock:
            try:
                while self._outbox and not self.gone:
                    del self._outbox[: self._sock.send(self._outbox)]
            except BlockingIOError:
                pass
            except OSError:
                self.gone = True

    def refuse(self, error: RequestError) -> None:
        """Say why, and hang up."""
        self._send(error_response(error, None))
        self.close()

    def close(self) -> None:
        """Hang up; replies still to come are dropped."""
        with self._lock:
            self.gone = True
            self._sock.close()


class SocketServer:
    """Serves a scheduler on a Unix socket. Raises ConfigError when the path cannot be taken.

    inherited: a listening socket opened by systemd, which is served instead and outlives this process. group: whose
    members alone may connect, beside root and this daemon's user.
    """

    def __init__(
        self, path: Path, scheduler: Scheduler, inherited: socket.socket | None = None, group: str | None = None
    ) -> None:
        self._path = path
        self._scheduler = scheduler
        self._group = None if group is None else group_id(group)
        self._listener = _listen(path, self._group) if inherited is None else inherited
        self._listener.setblocking(False)
        self._inode = path.lstat().st_ino if inherited is None else None
        self._connections: dict[int, _Connection] = {}
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._close_by_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="socket", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def close(self) -> None:
        """Send what is answered, hang up, and remove the socket if it is still ours."""
        self._close_by_s = time.monotonic() + FLUSH_S
        self._wake()
        self._thread.join()
        for connection in self._connections.values():
            connection.close()
        self._listener.close()
        with suppress(FileNotFoundError):
            if self._inode is not None and self._path.lstat().st_ino == self._inode:
                self._path.unlink()

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._wake_writer, b"\0")

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        poller.register(self._wake_reader, select.POLLIN)
        lines_left = False
        while not self._closed():
            for fd, connection in self._connections.items():
                poller.register(fd, connection.events)
            patience_ms = None if self._close_by_s is None else FLUSH_S * 1e3 / 10
            for fd, event in poller.poll(0 if lines_left else patience_ms):
                if fd == self._listener.fileno():
                    self._accept_waiting()
                elif fd == self._wake_reader:
                    os.read(self._wake_reader, 4096)
                elif event & HANG_UP:
                    self._connections[fd].gone = True
                else:
                    self._serve(self._connections[fd], event)
            lines_left = False
            for fd, connection in list(self._connections.items()):
                lines_left |= connection.answer_line()
                if connection.finished:
                    poller.unregister(fd)
                    del self._connections[fd]
                    connection.close()

    def _closed(self) -> bool:
        if self._close_by_s is None:
            return False
        return time.monotonic() >= self._close_by_s or all(c.flushed for c in self._connections.values())

    def _serve(self, connection: _Connection, event: int) -> None:
        if event & select.POLLOUT:
            connection.flush()
        if event & select.POLLIN:
            connection.receive()

    def _accept_waiting(self) -> None:
        for _ in range(MAX_CONNECTIONS):  # not for ever: those who are connected have their turn, too
            if not self._accept_one():
                return

    def _accept_one(self) -> bool:
        """Whether there was one to accept."""
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            log.warning("a client could not be accepted: %s", error.strerror)
            time.sleep(ACCEPT_PAUSE_S)  # out of file descriptors: the listener stays readable meanwhile
            return False
        connection = _Connection(sock, self._scheduler, self._wake)
        if self._group is not None and not is_member(sock, self._group):
            connection.refuse(RequestError("forbidden", "this socket serves the members of its group alone"))
        elif len(self._connections) >= MAX_CONNECTIONS:
            connection.refuse(RequestError("queue_full", f"{MAX_CONNECTIONS} clients are connected already"))
        else:
            self._connections[sock.fileno()] = connection
        return True


def _listen(path: Path, gid: int | None) -> socket.socket:
    _clear_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o660)  # the file is born with it: no moment in which others could connect
        listener.bind(str(path))
        if gid is not None:
            os.chown(path, -1, gid)
        path.chmod(0o660)  # a strict umask may have taken the group's half
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ConfigError(f"socket {path} cannot be opened: {error.strerror or error}") from None
    return listener


def _clear_stale(path: Path) -> None:
    """Remove the socket that a daemon left behind when it was killed; anything else in the way is an error."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # nothing there, or nothing to be seen: bind says what is wrong
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"socket {path}: a file that is no socket lies there; choose another path with --socket")
    if (live := connect(path)) is not None:
        live.close()
        raise ConfigError(f"socket {path} is already served by another daemon; choose another path with --socket")
    path.unlink(missing_ok=True)
