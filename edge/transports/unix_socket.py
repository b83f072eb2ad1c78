"""The Unix socket: one JSON object per line both ways, several requests in progress per connection.

One thread polls all connections; asyncio would cost 10 MB and 40 ms at the start. Replies are sent by the scheduler's
thread itself where the client keeps up, so that an answer waits for no other thread.
"""

import logging
import os
import select
import socket
import stat
import threading
import time
from collections import Counter
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Final

from edge.client import connect
from edge.serving.scheduler import Scheduler
from edge.system.heartbeat import Heartbeat
from edge.transports.peer_credentials import group_id, is_member, user_id
from edge.transports.socket_connection import Connection
from shared.errors import ConfigError, RequestError

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 64
USER_CONNECTIONS: Final = 32
"""Most connections of one user, except root and the daemon's own."""
RESERVED: Final = 4
"""Connections reserved for root and the daemon's user."""
FLUSH_S: Final = 2.0
"""How long `close` waits for clients to take their last replies."""
ACCEPT_PAUSE_S: Final = 0.1
HANG_UP: Final = select.POLLHUP | select.POLLERR | select.POLLNVAL


class SocketServer:
    """Serves a scheduler on a Unix socket. Raises ConfigError when the path cannot be taken.

    inherited: a listening socket of systemd's, served instead of `path` and left open. group: only its members may
    connect, beside root and the daemon's user.
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
        self._connections: dict[int, Connection] = {}
        self._numbers = count(1)
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._close_by_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="socket", daemon=True)
        self.heartbeat = Heartbeat(self._thread)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def close(self) -> None:
        """Send the last replies, hang up, and remove the socket if it is still this server's."""
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
            timeout_ms = None if self._close_by_s is None else FLUSH_S * 1e3 / 10
            events = poller.poll(0 if lines_left else timeout_ms)
            with self.heartbeat:
                for fd, event in events:
                    self._handle(fd, event)
                lines_left = False
                for fd, connection in list(self._connections.items()):
                    lines_left |= connection.answer_line()
                    if connection.finished:
                        with suppress(KeyError):  # accepted since the last poll
                            poller.unregister(fd)
                        del self._connections[fd]
                        connection.close()

    def _handle(self, fd: int, event: int) -> None:
        connection = self._connections.get(fd)
        if fd == self._listener.fileno():
            self._accept_waiting()
        elif fd == self._wake_reader:
            os.read(self._wake_reader, 4096)
        elif connection is not None and event & HANG_UP:
            connection.gone = True
        elif connection is not None:
            if event & select.POLLOUT:
                connection.flush()
            if event & select.POLLIN:
                connection.receive()

    def _closed(self) -> bool:
        if self._close_by_s is None:
            return False
        return time.monotonic() >= self._close_by_s or all(c.flushed for c in self._connections.values())

    def _accept_waiting(self) -> None:
        for _ in range(MAX_CONNECTIONS):  # bounded: connected clients have their turn, too
            if not self._accept_one():
                return

    def _accept_one(self) -> bool:
        """Accept a waiting connection.  → whether there was one"""
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            log.warning("a client could not be accepted: %s", error.strerror)
            time.sleep(ACCEPT_PAUSE_S)  # out of file descriptors: the listener stays readable meanwhile
            return False
        uid = user_id(sock)
        name = f"socket:{uid}/{next(self._numbers)}"
        connection = Connection(sock, self._scheduler, uid=uid, name=name, wake=self._wake)
        if self._group is not None and not is_member(sock, self._group):
            connection.refuse(RequestError("forbidden", "only members of its group may use this socket"))
            connection.close()
        elif not self._make_room(uid):
            connection.refuse(RequestError("queue_full", "too many clients are connected, and none of them is idle"))
            connection.close()
        else:
            self._connections[sock.fileno()] = connection
        return True

    def _make_room(self, uid: int) -> bool:
        """Whether there is room for a client of that user. If not, the user with most connections loses an idle one."""
        trusted = uid in (0, os.geteuid())
        clients = [connection for connection in self._connections.values() if not connection.gone]
        held = Counter(connection.uid for connection in clients)
        if not trusted and held[uid] >= USER_CONNECTIONS:
            loser = uid
        elif len(clients) >= MAX_CONNECTIONS - (0 if trusted else RESERVED):
            loser = held.most_common(1)[0][0]
        else:
            return True
        idle = [connection for connection in clients if connection.uid == loser and connection.idle]
        if not idle:
            return False
        longest = min(idle, key=lambda connection: connection.used_s)
        longest.refuse(RequestError("queue_full", "this connection was idle, and another client needed its place"))
        longest.gone = True
        return True


def _listen(path: Path, gid: int | None) -> socket.socket:
    _clear_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o660)  # before bind creates the file: at no time may others connect
        listener.bind(str(path))
        if gid is not None:
            os.chown(path, -1, gid)
        path.chmod(0o660)  # a strict umask may have removed the group's bits
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ConfigError(f"socket {path} cannot be opened: {error.strerror or error}") from None
    return listener


def _clear_stale(path: Path) -> None:
    """Remove the socket of a killed daemon; anything else at the path is an error."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # missing, or not accessible: bind reports it
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"socket {path}: that file is not a socket; choose another path with --socket")
    if (live := connect(path)) is not None:
        live.close()
        raise ConfigError(f"socket {path} is already served by another daemon; choose another path with --socket")
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # in /tmp another user's file cannot be removed
        owner = _user_name(path)
        message = f"a dead socket of {owner} is there and cannot be removed ({error.strerror})"
        raise ConfigError(f"socket {path}: {message}; choose another path with --socket") from None


def _user_name(path: Path) -> str:
    try:
        return path.owner()
    except (OSError, KeyError):
        return "another user"
