"""HTTP as a client writes it by hand: whole answers, their JSON, and the events of a stream."""

import http.client
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tests.integration.harness import TIMEOUT_S, Daemon

JSON = MappingProxyType({"Content-Type": "application/json"})


@dataclass(frozen=True)
class Answer:
    """headers: by lower-case name."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def object(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error that it is, which has a code and a sentence."""
        error: dict[str, Any] = self.object["error"]
        assert error["code"] and error["message"] and error["type"], error
        return error


def address_of(daemon: Daemon) -> tuple[str, int]:
    """Where a daemon serves HTTP, as its first line says."""
    found = re.search(r"http://(.+?):(\d+),", daemon.ready)
    assert found is not None, daemon.ready
    return found[1].strip("[]"), int(found[2])


def url_of(daemon: Daemon) -> str:
    """Of the page."""
    host, port = address_of(daemon)
    return f"http://{host}:{port}/"


def connect(daemon: Daemon, source: str = "") -> http.client.HTTPConnection:
    """A connection. source: the address to come from."""
    host, port = address_of(daemon)
    return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S, source_address=(source, 0) if source else None)


def ask(
    daemon: Daemon,
    path: str,
    body: object = None,
    *,
    method: str = "",
    headers: Mapping[str, str] = MappingProxyType({}),
) -> Answer:
    """One request on a connection of its own. body: an object as JSON, or bytes as they are."""
    connection = connect(daemon)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        head = dict(JSON if body is not None else {}) | dict(headers)
        connection.request(method or ("GET" if body is None else "POST"), path, data, head)
        reply = connection.getresponse()
        return Answer(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())
    finally:
        connection.close()


def complete(daemon: Daemon, **fields: Any) -> Answer:
    """POST /v1/completions."""
    return ask(daemon, "/v1/completions", fields)


def events(daemon: Daemon, **fields: Any) -> Iterator[tuple[str, str]]:
    """(name, data) of each event of a streamed completion."""
    answer = complete(daemon, stream=True, **fields)
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream"), answer
    text = answer.body.decode()
    assert text.endswith("\n\n")
    for block in text.removesuffix("\n\n").split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        assert lines.keys() <= {"event", "data"}, block
        yield lines.get("event", "message"), lines["data"]
