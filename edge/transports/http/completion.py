"""One completion under way: the scheduler's replies become an HTTP answer, whole or as server-sent events."""

import asyncio
import uuid
from contextlib import suppress
from typing import Final

import msgspec
from msgspec.structs import replace

from edge.transports.http.chat_shape import encode_as_chat
from edge.transports.http.errors import error_body
from edge.transports.http.exchange import Exchange
from edge.transports.http.openai_shape import Choice, Completion, CompletionRequest, final, usage_of, written
from shared.errors import RequestError
from shared.messages import Partial, Reply, Response, encode

DONE: Final = b"data: [DONE]\n\n"


class Answering:
    """Answers one request: an `edge.delivery.direct.Waiter`. For the event loop's thread, but for `gone` and `answer`.

    model: NAME@DIGEST, for pieces of a text that is not complete. chat: answer in the shape of a chat.
    """

    def __init__(
        self, exchange: Exchange, request: CompletionRequest, *, id: str | None, model: str, chat: bool
    ) -> None:
        self._encode = encode_as_chat if chat else _encode_completion
        self._exchange = exchange
        self._request = request
        self._id = f"cmpl-{id or uuid.uuid4().hex}"
        self._model = model
        self._created = 0
        self._loop = asyncio.get_running_loop()
        self._sent = ""  # of the text, in a stream

    @property
    def gone(self) -> bool:
        """Whether the client has hung up."""
        return self._exchange.gone

    def answer(self, reply: Reply, accepted_s: float) -> None:
        """Hand a reply to the event loop's thread. accepted_s: when the request came, in Unix time."""
        with suppress(RuntimeError):  # the loop has ended: the daemon stops
            self._loop.call_soon_threadsafe(self._deliver, reply, accepted_s)

    def _deliver(self, reply: Reply, accepted_s: float) -> None:
        self._created = int(accepted_s)
        if isinstance(reply, Partial):
            self._show(reply)
        elif isinstance(reply, Response) and reply.error is not None:
            self._refuse(RequestError(reply.error.code, reply.error.message, reply.error.retry_after_ms))
        elif isinstance(reply, Response) and self._request.stream:
            self._finish(reply)
        elif isinstance(reply, Response):
            self._exchange.answer(self._encode(replace(self._whole(reply), usage=usage_of(reply)), chunk=False))

    def _show(self, partial: Partial) -> None:
        """Send what has become final, and the snapshot if it is wanted and the client keeps up."""
        behind = self._exchange.unsent > 0
        if self._request.snapshots and not behind:
            self._exchange.write(b"event: snapshot\ndata: " + encode(partial) + b"\n\n")
        text = final(self._request, partial.text)
        if not behind and len(text) > len(self._sent):
            self._send_chunk(self._chunk([Choice(text=text[len(self._sent) :], finish_reason=None)]))
            self._sent = text

    def _send_chunk(self, chunk: Completion) -> None:
        self._exchange.write(b"data: " + self._encode(chunk, chunk=True) + b"\n\n")

    def _chunk(self, choices: list[Choice]) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices)

    def _whole(self, response: Response, skip: int = 0) -> Completion:
        """The completion, but for its usage, without the first `skip` characters of its text."""
        assert response.seed is not None and response.timing is not None
        text = written(self._request, response.text or "")[skip:]
        self._model = response.model or self._model
        chunk = self._chunk([Choice(text=text, finish_reason=response.finish_reason)])
        return replace(chunk, seed=response.seed, timing=response.timing)

    def _finish(self, response: Response) -> None:
        self._send_chunk(self._whole(response, len(self._sent)))
        options = self._request.stream_options
        if options is not None and options.include_usage:
            self._send_chunk(replace(self._chunk([]), usage=usage_of(response)))
        self._exchange.write(DONE)
        self._exchange.end()

    def _refuse(self, error: RequestError) -> None:
        """As a status, or, where the stream has begun, as its last event."""
        if not self._exchange.begun:
            self._exchange.refuse(error)
            return
        self._exchange.write(b"data: " + error_body(error) + b"\n\n")
        self._exchange.end()


def _encode_completion(completion: Completion, *, chunk: bool) -> bytes:
    return msgspec.json.encode(completion)
