"""The messages of the daemon: the same JSON objects over MQTT and over the Unix socket.

Every field is bounded here, so that a decoded message is a valid one; an unknown field is refused by name.
"""

from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from shared.conditions import Guidance
from shared.errors import ERROR_CODES, RequestError
from shared.manifest import MAX_STEPS, MAX_WINDOW, Decoder, Selection
from shared.validation import explain

PROTOCOL_VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 64 * 1024
MAX_GAP: Final = 1024
MAX_SEGMENTS: Final = 64
MAX_STOPS: Final = 4
MAX_DEADLINE_MS: Final = 600_000

_ID: Final = "1 to 128 characters without `/`, `+`, `#` and control characters"
Id = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^/+#\x00-\x1f]+\Z", description=_ID)]
Text = Annotated[str, Meta(max_length=MAX_MESSAGE_BYTES)]
MAX_CONDITIONS: Final = 8
"""Words of a request, and pictures of a request; a bundle takes fewer."""
_WORD: Final = "a word: 1 to 32 letters and digits, with single spaces, `-` and `'` between them"
Word = Annotated[str, Meta(max_length=32, pattern=r"^[^\W_]+(?:[ '’-][^\W_]+)*\Z", description=_WORD)]
Image = Annotated[str, Meta(max_length=MAX_MESSAGE_BYTES)]
ATTACHMENT: Final = "attachment:"
"""Begins an image that was sent in a message of its own, over MQTT or HTTP; the name it was sent under follows."""

StopText = Annotated[str, Meta(min_length=1, max_length=256)]


class Gap(Struct, frozen=True, forbid_unknown_fields=True):
    """Positions for the model to fill between two texts. gap: their number, in tokens; by blocks the most, for a gap
    may end before it is full. null: some room for blocks, a few tokens for a canvas.
    """

    gap: Annotated[int, Meta(ge=1, le=MAX_GAP)] | None


CANVAS_FIELDS: Final = ("steps", "selection", "threshold", "entropy_bound")
"""What only decoding by canvas has."""
CONDITION_FIELDS: Final = ("words", "images", "guidance")
"""What only decoding by blocks has, beside `window`."""


class GenerateRequest(
    Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True, tag="generate"
):
    """Ask for text: a `prompt` with an open end, or `segments` of text and gaps.

    Fields left out take the bundle's defaults. decode: "blocks" writes from the left, "canvas" everywhere at once; a
    field that one of them alone has asks for that one. window: the most drafts in a pass of blocks, which change the
    speed and never the text. stop: what is written ends before the first of these. `threshold` and `entropy_bound`
    commit adaptively; then `steps` is the most passes to make. One more follows where the last one drew an end left
    of text. words, images: what the text is to tell of, by blocks; a picture is a PNG or JPEG in base64. guidance: how
    much more it does so than the network's own law.
    """

    id: Id | None = None
    prompt: Text | None = None
    segments: Annotated[list[Text | Gap], Meta(min_length=1, max_length=MAX_SEGMENTS)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_GAP)] | None = None
    decode: Decoder | None = None
    window: Annotated[int, Meta(ge=0, le=MAX_WINDOW)] | None = None
    steps: Annotated[int, Meta(ge=1, le=MAX_STEPS)] | None = None
    selection: Selection | None = None
    temperature: Annotated[float, Meta(ge=0, le=10)] | None = None
    top_k: Annotated[int, Meta(ge=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    threshold: Annotated[float, Meta(gt=0, le=1)] | None = None
    entropy_bound: Annotated[float, Meta(ge=0, le=1000)] | None = None
    words: Annotated[list[Word], Meta(min_length=1, max_length=MAX_CONDITIONS)] | None = None
    images: Annotated[list[Image], Meta(min_length=1, max_length=MAX_CONDITIONS)] | None = None
    guidance: Guidance | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stop: Annotated[list[StopText], Meta(min_length=1, max_length=MAX_STOPS)] | None = None
    stream: bool = False
    deadline_ms: Annotated[int, Meta(ge=1, le=MAX_DEADLINE_MS)] | None = None
    response_topic: Annotated[str, Meta(max_length=1024)] | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.segments is None):
            raise ValueError("give exactly one of `prompt` and `segments`")
        if self.threshold is not None and self.entropy_bound is not None:
            raise ValueError("give at most one of `threshold` and `entropy_bound`")
        by_canvas = next((name for name in CANVAS_FIELDS if getattr(self, name) is not None), None)
        by_blocks = next((name for name in ("window", *CONDITION_FIELDS) if getattr(self, name) is not None), None)
        if by_canvas and by_blocks:
            raise ValueError(f"`{by_canvas}` is of decoding by canvas, `{by_blocks}` by blocks: give one of them")
        if by_canvas and self.decode == "blocks":
            raise ValueError(f"`{by_canvas}` is of decoding by canvas: leave it out, or `decode`")
        if by_blocks and self.decode == "canvas":
            raise ValueError(f"`{by_blocks}` is of decoding by blocks: leave it out, or `decode`")
        if self.guidance is not None and not self.conditioned:
            raise ValueError("`guidance` goes with `words` or `images`: give one of them, or leave it out")

    @property
    def conditioned(self) -> bool:
        """Whether it names what the text is to tell of."""
        return self.words is not None or self.images is not None

    @property
    def decoder(self) -> Decoder | None:
        """The decoder that it asks for by name or by a field of its own; None where any will do."""
        if self.decode is not None or self.window is not None or self.conditioned:
            return self.decode or "blocks"
        return "canvas" if any(getattr(self, name) is not None for name in CANVAS_FIELDS) else None


class HealthRequest(Struct, frozen=True, forbid_unknown_fields=True, tag="health"):
    """Ask for the daemon's health."""


class CancelRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="cancel"):
    """Stop the unfinished requests of that id; each is answered as `cancelled`.

    response_topic: only those answered there (MQTT). On the Unix socket, only requests of the same connection.
    """

    id: Id
    response_topic: Annotated[str, Meta(max_length=1024)] | None = None


class Usage(Struct, frozen=True, forbid_unknown_fields=True):
    """What a request cost. steps: evaluations of the network."""

    prompt_tokens: int
    generated_tokens: int
    steps: int


class Timing(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the time went, in milliseconds since the request was accepted."""

    queue_ms: float
    first_token_ms: float
    total_ms: float


class ErrorInfo(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Why there is no text. code: a key of ERROR_CODES."""

    code: str
    message: str
    retryable: bool = False
    retry_after_ms: int | None = None


class Response(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="response"):
    """The one terminal answer to a request. finish_reason: "length" where the text has no room left, else "stop"."""

    v: int = PROTOCOL_VERSION
    id: str | None = None
    status: Literal["ok", "error", "cancelled"]
    text: str | None = None
    finish_reason: Literal["stop", "length"] | None = None
    seed: int | None = None
    usage: Usage | None = None
    timing: Timing | None = None
    model: str | None = None
    error: ErrorInfo | None = None


class Part(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A piece of a snapshot. draft: not committed, only the best guess so far."""

    text: str
    draft: bool = False


class Partial(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="partial"):
    """A snapshot of the whole canvas: replaces the one before. text marks each open position with "░".

    parts: the same canvas in pieces, committed or drafted. A position without a draft is "░", and one after a drafted
    end is left out. appended: what a prompt's text has grown by since the last snapshot, by blocks: all of them and the
    rest of the answer are its text.
    """

    id: str | None
    seq: int
    step: int
    steps: int
    text: str
    masked: int
    parts: list[Part] = []
    appended: str | None = None


State = Literal["idle", "busy", "degraded", "draining", "error"]


class Health(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="health"):
    """The daemon's answer to a HealthRequest. queued: accepted requests that are not being computed yet.

    backend: what computes, such as "ort" or "trt". state: "degraded" is a GPU device that serves from its CPU, whether
    idle or busy; "error" a GPU that has failed under this daemon, which ends to be started again. failure: why, in
    these two states.
    """

    v: int = PROTOCOL_VERSION
    state: State
    queued: int
    model: str
    backend: str
    version: str
    failure: str | None = None


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """What a request must keep within. canvas_tokens: prompt and text together, and two more. words, images: 0 where
    this bundle, or this device, takes none; image_bytes: of one, decoded from base64. guidance: its default.
    """

    message_bytes: int
    canvas_tokens: int
    steps: int
    window: int
    top_k: int
    queue_size: int
    words: int = 0
    images: int = 0
    image_bytes: int = 0
    guidance: float = 0.0


class Info(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="info"):
    """What the daemon is and takes. schemas: JSON schema of each kind of request. decoders: the first is the default.

    deterministic: whether a text depends on request, seed and bundle alone. Not on a GPU that computes several requests
    in one batch: the last bit of a logit depends on the batch size there, and may tip a near tie.
    """

    v: int = PROTOCOL_VERSION
    version: str
    model: str
    backend: str
    deterministic: bool
    decoders: list[Decoder]
    limits: Limits
    schemas: dict[str, dict[str, Any]]


Reply = Response | Partial | Health
T = TypeVar("T")


class _Kind(Struct, frozen=True):
    type: str = "generate"


class _Identified(Struct, frozen=True):
    id: Id | None = None


OPEN_POSITION: Final = "░"


def _decode(payload: bytes, kind: type[T]) -> T:
    if len(payload) > MAX_MESSAGE_BYTES:
        raise RequestError("too_large", f"a message may have {MAX_MESSAGE_BYTES} bytes; this one has {len(payload)}")
    try:
        return msgspec.json.decode(payload, type=kind)
    except UnicodeDecodeError:
        raise RequestError("bad_request", "the message is not UTF-8") from None
    except msgspec.ValidationError as error:
        raise RequestError("bad_request", explain(error, kind, _plain(payload))) from None
    except (msgspec.DecodeError, RecursionError) as error:
        why = "UTF-8" if "UTF-8" in str(error) else f"JSON: {error}"  # which msgspec calls so from 0.23 on
        raise RequestError("bad_request", f"the message is not {why}") from None


def _plain(payload: bytes) -> object:
    """A message as builtin types; `...` if it is not JSON."""
    try:
        return msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ...


def decode_request(payload: bytes) -> GenerateRequest:
    """Decode a generate request.

    Raises RequestError, `too_large` or `bad_request`, naming the field that is wrong.
    """
    return _decode(payload, GenerateRequest)


def decode_cancel(payload: bytes) -> CancelRequest:
    """Decode a cancel request. Raises as decode_request does."""
    return _decode(payload, CancelRequest)


def decode_line(payload: bytes) -> GenerateRequest | CancelRequest | HealthRequest:
    """Decode one line of the Unix socket; its `type` is "generate" when left out. Raises as decode_request does."""
    kind = _decode(payload, _Kind).type
    if kind == "generate":
        return _decode(payload, GenerateRequest)
    if kind == "cancel":
        return _decode(payload, CancelRequest)
    if kind == "health":
        return _decode(payload, HealthRequest)
    raise RequestError("bad_request", f'unknown type {kind!r}: send "generate", "cancel" or "health"')


def id_of(payload: bytes) -> str | None:
    """The id of an invalid request, if it can be read: its error is sent under it."""
    try:
        return msgspec.json.decode(payload, type=_Identified).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def error_response(error: RequestError, id: str | None) -> Response:
    """The reply that a refused or failed request gets."""
    status: Literal["error", "cancelled"] = "cancelled" if error.code == "cancelled" else "error"
    assert error.code in ERROR_CODES
    return Response(
        id=id, status=status, error=ErrorInfo(error.code, str(error), error.retryable, error.retry_after_ms)
    )


def encode(message: Struct) -> bytes:
    """One line of JSON, without the newline."""
    return msgspec.json.encode(message)
