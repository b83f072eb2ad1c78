"""Chats as OpenAI's clients write and read them, for programs that know nothing else, such as Open WebUI.

The model was taught no dialogue: the last message is the beginning of a text, and the answer what follows it.
"""

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from edge.transports.http.openai_shape import (
    AnyRequest,
    Completion,
    CompletionRequest,
    CompletionUsage,
    Ignored,
    check_openai_fields,
)
from shared.conditions import Guidance
from shared.messages import CONDITION_FIELDS, MAX_CONDITIONS, MAX_GAP, Image, Text, Timing, Word

MAX_CHAT: Final = 1024


class TextPart(Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(Struct, frozen=True, forbid_unknown_fields=True):
    """What somebody said. name: taken and not used."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Ignored | None = None


class ChatRequest(AnyRequest, frozen=True, kw_only=True):
    """Ask for what follows the last of `messages`; those before it are taken and not used.

    max_completion_tokens: OpenAI's newer name of max_tokens. words, images, guidance: as of a completion.
    """

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_CHAT)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_GAP)] | None = None
    words: Annotated[list[Word], Meta(min_length=1, max_length=MAX_CONDITIONS)] | None = None
    images: Annotated[list[Image], Meta(min_length=1, max_length=MAX_CONDITIONS)] | None = None
    guidance: Guidance | None = None

    def __post_init__(self) -> None:
        check_openai_fields(self)
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("`max_tokens` and `max_completion_tokens` differ: give one of them")


class Said(Struct, frozen=True, kw_only=True):
    """The answer's text, or a piece of it."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Struct, frozen=True, kw_only=True):
    """The answer. finish_reason: as of a completion."""

    index: int = 0
    message: Said
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class ChatDelta(Struct, frozen=True, kw_only=True):
    """A piece of the answer."""

    index: int = 0
    delta: Said
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(Struct, frozen=True, kw_only=True):
    """An answer; else as a completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    timing: Timing | UnsetType = UNSET


class ChatChunk(Struct, frozen=True, kw_only=True):
    """A chunk of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDelta]
    usage: CompletionUsage | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    timing: Timing | UnsetType = UNSET


def to_completion(chat: ChatRequest) -> CompletionRequest:
    """The completion that answers it."""
    fields: dict[str, Any] = {name: getattr(chat, name) for name in (*AnyRequest.__struct_fields__, *CONDITION_FIELDS)}
    fields["max_tokens"] = chat.max_tokens or chat.max_completion_tokens
    content = chat.messages[-1].content
    prompt = content if isinstance(content, str) else "".join(part.text for part in content)
    return CompletionRequest(prompt=prompt, **fields)


def encode_as_chat(completion: Completion, *, chunk: bool) -> bytes:
    """A completion, or a chunk of one, as an answer in a chat, in JSON."""
    fields: dict[str, Any] = msgspec.structs.asdict(completion)
    said = [(Said(content=choice.text), choice.finish_reason) for choice in completion.choices]
    fields["id"] = f"chat{completion.id}"
    del fields["object"]
    if chunk:
        fields["choices"] = [ChatDelta(delta=text, finish_reason=why) for text, why in said]
        return msgspec.json.encode(ChatChunk(**fields))
    fields["choices"] = [ChatChoice(message=text, finish_reason=why) for text, why in said]
    return msgspec.json.encode(ChatCompletion(**fields))
