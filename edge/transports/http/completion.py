"""One completion under way: the scheduler's replies become an HTTP answer, whole or as server-sent events."""

import asyncio
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import msgspec
from msgspec.structs import replace

from edge.transports.http.errors import error_body
from edge.transports.http.exchange import Exchange
from edge.transports.http.openai_shape import Choice, Completion, CompletionRequest, final, usage_of, written
from shared.errors import RequestError
from shared.messages import Partial, Reply, Response, encode

DONE: Final = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Label:
    """What every chunk of an answer repeats. created: Unix time."""

    id: str
    created: int
    model: str


class Answering:
    """Answers one request. `reply` may be called in any thread, all else in the event loop's."""

    def __init__(self, exchange: Exchange, request: CompletionRequest, label: Label) -> None:
        self.exchange = exchange
        self._request = request
        self._label = label
        self._loop = asyncio.get_running_loop()
        self._sent = ""  # of the text, in a stream

    def reply(self, reply: Reply) -> None:
        """Hand a reply of the scheduler to the event loop's thread."""
        with suppress(RuntimeError):  # the loop has ended: the daemon stops
            self._loop.call_soon_threadsafe(self._deliver, reply)

    def _deliver(self, reply: Reply) -> None:
        if isinstance(reply, Partial):
            self._show(reply)
        elif isinstance(reply, Response) and reply.error is not None:
            self._refuse(RequestError(reply.error.code, reply.error.message, reply.error.retry_after_ms))
        elif isinstance(reply, Response) and self._request.stream:
            self._finish(reply)
        elif isinstance(reply, Response):
            self.exchange.answer(msgspec.json.encode(replace(self._whole(reply), usage=usage_of(reply))))

    def _show(self, partial: Partial) -> None:
        """Send what has become final, and the snapshot if it is wanted and the client keeps up."""
        behind = self.exchange.unsent > 0
        if self._request.snapshots and not behind:
            self.exchange.write(b"event: snapshot\ndata: " + encode(partial) + b"\n\n")
        text = final(self._request, partial.text)
        if not behind and len(text) > len(self._sent):
            self._send_text(text[len(self._sent) :])
            self._sent = text

    def _send_text(self, text: str) -> None:
        self._send_chunk(self._chunk([Choice(text=text, finish_reason=None)]))

    def _send_chunk(self, chunk: Completion) -> None:
        self.exchange.write(b"data: " + msgspec.json.encode(chunk) + b"\n\n")

    def _chunk(self, choices: list[Choice]) -> Completion:
        label = self._label
        return Completion(id=label.id, created=label.created, model=label.model, choices=choices)

    def _whole(self, response: Response, skip: int = 0) -> Completion:
        """The completion, but for its usage, without the first `skip` characters of its text."""
        assert response.seed is not None and response.timing is not None
        text = written(self._request, response.text or "")[skip:]
        chunk = self._chunk([Choice(text=text, finish_reason=response.finish_reason)])
        return replace(chunk, seed=response.seed, timing=response.timing)

    def _finish(self, response: Response) -> None:
        self._send_chunk(self._whole(response, len(self._sent)))
        options = self._request.stream_options
        if options is not None and options.include_usage:
            self._send_chunk(replace(self._chunk([]), usage=usage_of(response)))
        self.exchange.write(DONE)
        self.exchange.end()

    def _refuse(self, error: RequestError) -> None:
        """As a status, or, where the stream has begun, as its last event."""
        if not self.exchange.begun:
            self.exchange.refuse(error)
            return
        self.exchange.write(b"data: " + error_body(error) + b"\n\n")
        self.exchange.end()


def label_of(id: str | None, model: str) -> Label:
    """A label for a new answer."""
    return Label(f"cmpl-{id or uuid.uuid4().hex}", int(time.time()), model)
