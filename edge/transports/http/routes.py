"""What is at which path."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from edge.delivery.direct import DirectRequests
from edge.serving.prometheus import CONTENT_TYPE, prometheus_text
from edge.serving.scheduler import SNAPSHOT_S, Scheduler
from edge.transports.attachments import Attachments
from edge.transports.http.access import Access
from edge.transports.http.attaching import MESSAGE, PATH, PICTURE, Attached, Limit, is_upload, name_of, owner_of
from edge.transports.http.chat_shape import ChatRequest, to_completion
from edge.transports.http.completion import Answering
from edge.transports.http.errors import MethodError
from edge.transports.http.exchange import Exchange, Request
from edge.transports.http.fleet import FleetReaders
from edge.transports.http.models import model_list
from edge.transports.http.openai_shape import CompletionRequest, decode_body, to_generate
from edge.transports.http.openapi import openapi_document
from shared.errors import RequestError
from shared.messages import ATTACHMENT, GenerateRequest, Id, encode
from shared.validation import explain

PAGE: Final = Path(__file__).parent / "page"
KINDS: Final[dict[str, str]] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
"""Suffix → type of the page's files."""
PAGE_HEADERS: Final = (
    # The page is its own files alone: nothing inline, nothing of another origin, in no frame, no form that leaves.
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("referrer-policy", "no-referrer"),
)
Handler = Callable[[Request, Exchange], None]


class Routes:
    """Answers requests for a scheduler. device: its name in the metrics."""

    def __init__(
        self,
        scheduler: Scheduler,
        direct: DirectRequests,
        *,
        access: Access,
        queue_size: int,
        device: str,
        fleet: FleetReaders,
        attachments: Attachments,
    ) -> None:
        self._scheduler = scheduler
        self._direct = direct
        self._access = access
        self._queue_size = queue_size
        self._device = device
        self._fleet = fleet
        self._attachments = attachments
        self._page = {f"/page/{file.name}": file for file in PAGE.iterdir() if file.suffix in KINDS}
        self._page["/"] = PAGE / "index.html"
        self._routes: dict[str, tuple[str, Handler]] = {
            "/v1/completions": ("POST", self._complete),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
            "/fleet": ("GET", lambda _, exchange: fleet.serve(exchange)),
            "/openapi.json": ("GET", self._openapi),
        }

    def limit(self, head: Request) -> Limit:
        """Of a request's body, by its head. Raises RequestError: a picture of a stranger is refused before it comes."""
        if not is_upload(head):
            return MESSAGE
        self._access.check(head.headers)
        return PICTURE

    def serve(self, request: Request, exchange: Exchange) -> None:
        """Answer a request, now or later. Raises RequestError."""
        if request.path in self._page and request.method in ("GET", "HEAD"):
            self._access.check_page(request.headers)
            file = self._page[request.path]
            exchange.answer(file.read_bytes(), kind=KINDS[file.suffix], headers=PAGE_HEADERS)
            return
        self._access.check(request.headers)
        method, handler = self._routes.get(request.path, ("GET", None))
        if request.path.startswith("/v1/models/"):
            handler = self._model
        elif request.path.startswith(PATH):
            method, handler = "PUT", self._attach
        if handler is None:
            raise RequestError("not_found", f"nothing is at {request.path}: see /v1/completions, /health or /")
        if request.method != method and (method, request.method) != ("GET", "HEAD"):
            raise MethodError(request.path, request.method, takes=method)
        handler(request, exchange)

    def _complete(self, request: Request, exchange: Exchange) -> None:
        self._write(request, exchange, decode_body(_json_of(request), CompletionRequest), chat=False)

    def _chat(self, request: Request, exchange: Exchange) -> None:
        completion = to_completion(decode_body(_json_of(request), ChatRequest))
        self._write(request, exchange, completion, chat=True)

    def _attach(self, request: Request, exchange: Exchange) -> None:
        name, file = name_of(request), request.body
        self._attachments.put(owner_of(request), name, file, self._scheduler.loaded.takes_conditions)
        attached = Attached(image=f"{ATTACHMENT}{name}", bytes=len(file))
        exchange.answer(msgspec.json.encode(attached), status=201 if file else 200)

    def _write(self, request: Request, exchange: Exchange, completion: CompletionRequest, *, chat: bool) -> None:
        id = _id_of(request, completion)
        wanted = to_generate(completion, id)
        client, now_s = f"http:{request.unit}", time.time()

        def attached(whole: GenerateRequest) -> GenerateRequest:
            return self._attachments.attached(owner_of(request), whole)

        answering = Answering(exchange, completion, id=id, model=self._scheduler.model, chat=chat)
        if id is None:
            self._scheduler.submit(
                attached(wanted),
                lambda reply: answering.answer(reply, now_s),
                gone=lambda: answering.gone,
                client=client,
            )
            return
        digest = hashlib.sha256(encode(completion)).digest()
        self._direct.accept(
            wanted,
            answering,
            attached=attached,
            digest=digest,
            client=client,
            accepted_s=now_s,
            every_s=SNAPSHOT_S,
        )

    def _models(self, request: Request, exchange: Exchange) -> None:
        models = model_list(self._scheduler.loaded, self._queue_size)
        exchange.answer(msgspec.json.encode(models))

    def _model(self, request: Request, exchange: Exchange) -> None:
        (model,) = model_list(self._scheduler.loaded, self._queue_size).data
        if request.path.removeprefix("/v1/models/") != model.id:
            raise RequestError("not_found", f"this device has the model {model.id} alone")
        exchange.answer(msgspec.json.encode(model))

    def _health(self, request: Request, exchange: Exchange) -> None:
        health = self._scheduler.health()
        out_of_service = health.state in ("draining", "error")
        exchange.answer(encode(health), status=503 if out_of_service else 200)

    def _openapi(self, request: Request, exchange: Exchange) -> None:
        document = openapi_document(self._scheduler.health().version, fleet=self._fleet.known)
        exchange.answer(msgspec.json.encode(document))

    def _metrics(self, request: Request, exchange: Exchange) -> None:
        text = prometheus_text(self._scheduler.metrics(), device=self._device)
        exchange.answer(text.encode(), kind=CONTENT_TYPE)


def _json_of(request: Request) -> bytes:
    """The body. Raises RequestError where it is said to be anything else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"send JSON, with the header `Content-Type: application/json`, not {kind or 'none'!r}"
        raise RequestError("unsupported_media", message)
    return request.body


def _id_of(request: Request, completion: CompletionRequest) -> str | None:
    """The request's id, of its header or its body. Raises RequestError."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return completion.id
    if completion.id not in (None, key):
        raise RequestError("bad_request", "`id` and the header Idempotency-Key differ: give one of them")
    try:
        return msgspec.convert(key, Id)
    except msgspec.ValidationError as error:
        raise RequestError("bad_request", f"Idempotency-Key: {explain(error, Id, key)}") from None
