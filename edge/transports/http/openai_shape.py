"""Completions as OpenAI's clients write and read them, and what they are among our own messages."""

from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from shared.conditions import Guidance
from shared.errors import RequestError
from shared.manifest import MAX_STEPS, MAX_WINDOW, Decoder, Selection
from shared.messages import (
    MAX_CONDITIONS,
    MAX_DEADLINE_MS,
    MAX_GAP,
    MAX_SEGMENTS,
    MAX_STOPS,
    OPEN_POSITION,
    Gap,
    GenerateRequest,
    Id,
    Image,
    Response,
    StopText,
    Text,
    Timing,
    Word,
)
from shared.validation import explain

Ignored = Annotated[str, Meta(max_length=256)]
Asked = TypeVar("Asked", bound=Struct)

One = Annotated[Any, Meta(extra_json_schema={"enum": [1, None]})]
Zero = Annotated[Any, Meta(extra_json_schema={"enum": [0, None]})]
No = Annotated[Any, Meta(extra_json_schema={"enum": [False, None]})]
Nothing = Annotated[Any, Meta(extra_json_schema={"enum": [None]})]

UNSUPPORTED: Final[dict[str, tuple[object, str]]] = {
    "n": (1, "a request is one text: send several for more"),
    "best_of": (1, "a request is one text: send several and choose"),
    "echo": (False, "the prompt is not repeated: put it before the text yourself"),
    "logprobs": (None, "this device gives text alone"),
    "logit_bias": (None, "tokens cannot be favoured"),
    "presence_penalty": (0, "this device has no penalties: use `temperature`, `top_p`, `top_k`"),
    "frequency_penalty": (0, "this device has no penalties: use `temperature`, `top_p`, `top_k`"),
}
"""Fields of OpenAI's that are refused unless they say what holds anyhow: that value, and the reason."""


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """include_usage: send a last chunk with the usage."""

    include_usage: bool = False


def check_openai_fields(request: Struct) -> None:
    """Raises ValueError for a field of OpenAI's that asks for what this device does not do."""
    for name, (neutral, why) in UNSUPPORTED.items():
        given = getattr(request, name, None)
        if given is not None and (given != neutral or isinstance(given, bool) != isinstance(neutral, bool)):
            raise ValueError(f"`{name}` is not supported: {why}")
    for name in ("stream_options", "snapshots"):
        if getattr(request, name, None) and not getattr(request, "stream", None):
            raise ValueError(f"`{name}` goes with `stream`")


class AnyRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What completions and chats have in common.

    model, user: taken and not used; the one bundle of this device answers. id: the same as the header Idempotency-Key.
    """

    model: Ignored | None = None
    user: Ignored | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_GAP)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=10)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    id: Id | None = None
    n: One = None
    logprobs: Nothing = None
    logit_bias: Nothing = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None


class CompletionRequest(AnyRequest, frozen=True, kw_only=True):
    """Ask for text: a `prompt` that is continued, up to a `suffix` if there is one, or `segments` of text and gaps.

    max_tokens: the most tokens to write; with a suffix, in the gap before it. snapshots: with stream, also send
    `event: snapshot`. The other fields are those of the protocol's `generate`.
    """

    prompt: Text | None = None
    suffix: Text | None = None
    segments: Annotated[list[Text | Gap], Meta(min_length=1, max_length=MAX_SEGMENTS)] | None = None
    snapshots: bool | None = None
    decode: Decoder | None = None
    window: Annotated[int, Meta(ge=0, le=MAX_WINDOW)] | None = None
    steps: Annotated[int, Meta(ge=1, le=MAX_STEPS)] | None = None
    selection: Selection | None = None
    top_k: Annotated[int, Meta(ge=1)] | None = None
    threshold: Annotated[float, Meta(gt=0, le=1)] | None = None
    entropy_bound: Annotated[float, Meta(ge=0, le=1000)] | None = None
    words: Annotated[list[Word], Meta(min_length=1, max_length=MAX_CONDITIONS)] | None = None
    images: Annotated[list[Image], Meta(min_length=1, max_length=MAX_CONDITIONS)] | None = None
    guidance: Guidance | None = None
    deadline_ms: Annotated[int, Meta(ge=1, le=MAX_DEADLINE_MS)] | None = None
    best_of: One = None
    echo: No = None

    def __post_init__(self) -> None:
        check_openai_fields(self)
        if self.suffix and self.prompt is None:
            raise ValueError("`suffix` is what follows the gap after `prompt`: give both")


SHARED: Final = tuple(
    name
    for name in GenerateRequest.__struct_fields__
    if name in CompletionRequest.__struct_fields__ and name != "stream"
)
"""Fields that mean the same in both requests."""


class Choice(Struct, frozen=True, kw_only=True):
    """The text, or a piece of it. finish_reason: `stop` at an end of its own, `length` where the room was used up."""

    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class CompletionUsage(Struct, frozen=True, kw_only=True):
    """What it cost. steps: evaluations of the network."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    steps: int


class Completion(Struct, frozen=True, kw_only=True):
    """A completion, or a chunk of a streamed one. model: NAME@DIGEST.

    Of a stream the last chunk with a choice has seed and timing, and one after it, if it is asked for, the usage.
    """

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: CompletionUsage | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    timing: Timing | UnsetType = UNSET


def decode_body(body: bytes, kind: type[Asked]) -> Asked:
    """Decode a request's body. Raises RequestError, `bad_request`, naming the field that is wrong."""
    try:
        return msgspec.json.decode(body, type=kind)
    except UnicodeDecodeError:
        raise RequestError("bad_request", "the message is not UTF-8") from None
    except msgspec.ValidationError as error:
        raise RequestError("bad_request", explain(error, kind, _plain(body))) from None
    except (msgspec.DecodeError, RecursionError) as error:
        why = "UTF-8" if "UTF-8" in str(error) else f"JSON: {error}"  # which msgspec calls so from 0.23 on
        raise RequestError("bad_request", f"the message is not {why}") from None


def _plain(body: bytes) -> object:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ...


def to_generate(request: CompletionRequest, id: str | None) -> GenerateRequest:
    """The same among our own messages. Raises RequestError."""
    fields = {name: getattr(request, name) for name in SHARED}
    fields["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop or None
    if request.suffix:
        gap = Gap(fields.pop("max_tokens"))
        fields["segments"] = [fields.pop("prompt"), gap, request.suffix]
    try:
        return GenerateRequest(**fields | {"id": id, "stream": bool(request.stream)})
    except ValueError as error:
        raise RequestError("bad_request", str(error)) from None


def written(request: CompletionRequest, text: str) -> str:
    """What was written of a whole text: that after the prompt and before the suffix; with `segments` all of it."""
    return text[len(request.prompt or "") : len(text) - len(request.suffix or "")]


def final(request: CompletionRequest, text: str) -> str:
    """What of a snapshot's text can no longer change: what was written up to the first open position.

    The bytes of a character that is not complete yet are left out.
    """
    before, is_open, _ = text[len(request.prompt or "") :].partition(OPEN_POSITION)
    if request.suffix and not is_open:
        before = before[: len(before) - len(request.suffix)]
    return before.rstrip("\N{REPLACEMENT CHARACTER}")


def usage_of(response: Response) -> CompletionUsage:
    """An answer's usage."""
    assert response.usage is not None
    prompt, new, steps = response.usage.prompt_tokens, response.usage.generated_tokens, response.usage.steps
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new, steps=steps)
