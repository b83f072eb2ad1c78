"""The HTTP server: listening sockets, and a thread with the event loop that serves them."""

import asyncio
import ipaddress
import logging
import socket
import threading
from collections.abc import Sequence
from typing import Final

from edge.config import Config, read_token
from edge.delivery.journal import Journal
from edge.delivery.outbox import Outbox
from edge.serving.scheduler import Scheduler
from edge.system.heartbeat import Sign
from edge.transports.attachments import Attachments
from edge.transports.http.access import Access
from edge.transports.http.attaching import MAX_UPLOADS, MAX_UPLOADS_OF_UNIT, MESSAGE, Limit
from edge.transports.http.connection import Connection
from edge.transports.http.exchange import Exchange, Request
from edge.transports.http.fleet import FleetReaders, FleetSource
from edge.transports.http.places import MAX_CONNECTIONS, Pace, Places
from edge.transports.http.routes import Routes
from shared.errors import ConfigError, RequestError

log = logging.getLogger(__name__)

FLUSH_S: Final = 2.0
"""How long `close` waits for clients to take their last answers."""
BUFFER_BYTES: Final = 64 * 1024
"""Of the kernel, for each direction of a connection."""


class HttpServer:
    """Serves a scheduler over HTTP. Raises ConfigError when an address cannot be taken, or would be open to strangers.

    outbox, attachments: of MQTT; without it the server has its own, the outbox with the journal. inherited: listening
    sockets of systemd's, served instead of `http.listen`. fleet: the devices of the broker, which the server closes.
    """

    def __init__(
        self,
        config: Config,
        scheduler: Scheduler,
        *,
        outbox: Outbox | None = None,
        attachments: Attachments | None = None,
        inherited: Sequence[socket.socket] = (),
        fleet: FleetSource | None = None,
    ) -> None:
        token = read_token(config.http)
        self._listeners = list(inherited) or open_listeners(config.http.listen or "")
        for listener in self._listeners:
            check_exposure(listener, token)
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                listener.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its connections inherit it
        self.places: Places[Connection] = Places()
        self.pace = Pace()
        self.closing = False
        self.protected = token is not None
        self._scheduler = scheduler
        self._own_outbox = None
        if outbox is None:
            self._own_outbox = outbox = Outbox(Journal(config.state), scheduler)
        self._fleet = FleetReaders(fleet)
        self._routes = Routes(
            scheduler,
            outbox.direct,
            access=Access(token),
            queue_size=config.queue_size,
            device=config.device,
            fleet=self._fleet,
            attachments=attachments or Attachments(),
        )
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._pings = self._pongs = 0
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    @property
    def url(self) -> str:
        """Of the page."""
        host, port, *_ = self._listeners[0].getsockname()
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def signs(self) -> dict[str, Sign]:
        """Of its threads, for the watchdog."""
        own = {} if self._own_outbox is None else {"outbox": self._own_outbox.heartbeat}
        return {"http": self._sign, **own}

    def start(self) -> None:
        """Resume what an earlier process left, and begin to serve."""
        if self._own_outbox is not None:
            self._own_outbox.start()
        self._thread.start()

    def _sign(self) -> tuple[int, bool]:
        """Turns of the event loop that it asked for, and whether one of them is overdue."""
        overdue = self._pongs < self._pings
        if not overdue and self._thread.is_alive():
            self._pings += 1
            self._loop.call_soon_threadsafe(self._pong)
        return self._pongs, overdue or not self._thread.is_alive()

    def close(self) -> None:
        """Send the last answers and hang up; bounded in time."""
        self._fleet.close()
        if self._own_outbox is not None:
            self._own_outbox.close(FLUSH_S)
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    # --- Site: what connections need ----------------------------------------------------------------------------------

    def limit(self, head: Request) -> Limit:
        """Of the body of a request. Raises RequestError for a picture that nobody may send, or of too many at once."""
        limit = self._routes.limit(head)
        if limit is MESSAGE:
            return limit
        coming = [connection.unit for connection in self.places if connection.uploading]
        if len(coming) >= MAX_UPLOADS or coming.count(head.unit) >= MAX_UPLOADS_OF_UNIT:
            raise RequestError("queue_full", f"{len(coming)} attachments are coming in at this moment", 1000)
        return limit

    def serve(self, request: Request, exchange: Exchange) -> None:
        """Answer a request, now or later. Raises RequestError."""
        self._routes.serve(request, exchange)

    def note(self, error: RequestError, unit: str) -> None:
        """Count a refusal."""
        self._scheduler.requests.note(code=error.code, id=None, client=f"http:{unit}")

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _pong(self) -> None:
        self._pongs += 1

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve_until_closed())

    async def _serve_until_closed(self) -> None:
        servers = [
            await self._loop.create_server(lambda: Connection(self), sock=listener, backlog=MAX_CONNECTIONS)
            for listener in self._listeners
        ]
        await self._stop.wait()
        self.closing = True
        for server in servers:
            server.close()
        give_up_s = self._loop.time() + FLUSH_S
        while self._loop.time() < give_up_s and not all(connection.flushed for connection in self.places):
            await asyncio.sleep(0.02)
        for connection in self.places:
            connection.abort()
        await asyncio.sleep(0)  # connections are told that they are lost


def open_listeners(listen: str) -> list[socket.socket]:
    """Sockets bound to each address of HOST:PORT. Raises ConfigError."""
    host, _, port = listen.rpartition(":")
    if int(port) > 65535:
        raise ConfigError(f"http.listen {listen}: a port is at most 65535")
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            listeners.append(socket.create_server(address[:2], family=family))
    except OSError as error:
        for listener in listeners:
            listener.close()
        why = str(error.strerror or error).partition(" (while attempting")[0]
        raise ConfigError(f"http.listen {listen} cannot be opened: {why}") from None
    return listeners


def check_exposure(listener: socket.socket, token: str | None) -> None:
    """Raise ConfigError for an address that others can reach, unless there is a token."""
    host = listener.getsockname()[0]
    if token is None and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        raise ConfigError(
            f"http.listen {host}: others can reach this address, so `http.token_file` must name a file with a token"
        )
