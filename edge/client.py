"""A client of the Unix socket. Imports no runtime, so that it starts at once."""

import socket
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from shared.errors import ConfigError, RequestError
from shared.messages import MAX_MESSAGE_BYTES, GenerateRequest, Health, HealthRequest, Partial, Response, encode

HEALTH_S: Final = 5.0
REPLIES: Final = msgspec.json.Decoder(Partial | Response)
HEALTH: Final = msgspec.json.Decoder(Health)


def connect(path: Path) -> socket.socket | None:
    """A connection to the daemon at `path`; None when none listens there.

    Raises ConfigError when the path cannot be used at all, or its socket may not be opened.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise ConfigError(f"socket {path} cannot be used: {error.strerror or error}") from None
    return connection


def ask(connection: socket.socket, request: GenerateRequest) -> Generator[Partial | Response, None, None]:
    """Send one request.  → its snapshots, if it streams, then its response

    Raises RequestError when the daemon leaves before its answer.
    """
    try:
        with suppress(BrokenPipeError, ConnectionResetError):  # the daemon hung up: its reply says why
            connection.sendall(encode(request) + b"\n")
        with connection.makefile("rb") as lines:
            for line in lines:
                reply = REPLIES.decode(line)
                yield reply
                if isinstance(reply, Response):
                    return
    except OSError as error:
        raise RequestError("internal", f"the connection to the daemon broke: {error.strerror or error}") from None
    except msgspec.DecodeError as error:
        raise RequestError("internal", f"the daemon's reply cannot be read: {error}") from None
    raise RequestError("internal", "the daemon hung up before it answered")


def health(connection: socket.socket) -> Health | None:
    """The daemon's health; None when no valid answer comes within HEALTH_S."""
    connection.settimeout(HEALTH_S)
    try:
        connection.sendall(encode(HealthRequest()) + b"\n")
        with connection.makefile("rb") as lines:
            return HEALTH.decode(lines.readline(MAX_MESSAGE_BYTES))
    except (OSError, msgspec.MsgspecError):
        return None
