"""Every message class, with every field set, survives the wire and refuses what it does not know."""

import inspect
from typing import Any

import msgspec
import pytest
from msgspec import Struct

from shared import messages, metrics
from shared.messages import (
    CancelRequest,
    ErrorInfo,
    Gap,
    GenerateRequest,
    Health,
    HealthRequest,
    Info,
    Limits,
    Part,
    Partial,
    Reply,
    Response,
    Timing,
    Usage,
    encode,
)
from shared.metrics import Decoded, Drafts, Histogram, Metrics

EXAMPLES: tuple[Struct, ...] = (
    Gap(4),
    GenerateRequest(
        id="a-1",
        prompt="Once upon a time",
        max_tokens=40,
        decode="canvas",
        steps=16,
        selection="margin",
        temperature=0.7,
        top_k=20,
        top_p=0.9,
        threshold=0.8,
        seed=2**63 - 1,
        stop=["\n", "The end"],
        stream=True,
        deadline_ms=5000,
        response_topic="edgelm/reply/me",
    ),
    GenerateRequest(segments=["Tom had a ", Gap(4), " and it was ", Gap(None), "."], entropy_bound=2.5),
    GenerateRequest(prompt="", window=2),
    GenerateRequest(prompt="", words=["dragon", "ice cream"], images=["YQ==", "attachment:card"], guidance=1.5),
    CancelRequest(id="a-1", response_topic="edgelm/reply/me"),
    HealthRequest(),
    Usage(prompt_tokens=5, generated_tokens=40, steps=16),
    Timing(queue_ms=0.5, first_token_ms=20.25, total_ms=400.0),
    ErrorInfo("queue_full", "32 requests are waiting", retryable=True, retry_after_ms=900),
    Response(
        v=2,
        id="a-1",
        status="ok",
        text="Once upon a time there was a “fox”.\n",
        finish_reason="stop",
        seed=7,
        usage=Usage(5, 40, 16),
        timing=Timing(0.5, 20.25, 400.0),
        model="tinystories@0123456789ab",
        error=ErrorInfo("internal", "…"),
    ),
    Partial(
        id="a-1",
        seq=3,
        step=4,
        steps=16,
        text="Once ░░░",
        masked=3,
        parts=[Part("Once "), Part("upon", True)],
        appended=" upon",
    ),
    Part(text=" upon", draft=True),
    Metrics(
        v=2,
        version="0.1.0",
        model="tinystories@01",
        state="busy",
        uptime_s=60.5,
        accepted=3,
        answered={"ok": 2, "timeout": 1},
        latency=Histogram((0.1, 1.0), (0, 1, 1), 3.5),
        first_token=Histogram((0.1, 1.0), (2, 0, 0), 0.125),
        prompt_tokens=8,
        generated_tokens=400,
        tokens_per_s=6.667,
        decoded={"blocks": Decoded(400, 200, 2.0), "canvas": Decoded(0, 0, None)},
        drafts=[Drafts(1, 198, 150), Drafts(2, 190, 50)],
        steps=96,
        active=1,
        queued=2,
        backend="ort",
        resident_mb=92.5,
        available_mb=4096.0,
        watts={"VDD_IN": 5.25},
        celsius={"cpu-thermal": 48.5},
        read_s=1732841000.5,
        dropped=3,
        undeliverable=1,
        failure="cuEventSynchronize failed",
    ),
    Decoded(tokens=4, passes=2, tokens_per_pass=2.0),
    Drafts(depth=1, drafted=3, kept=2),
    Histogram(bounds_s=(0.1,), counts=(1, 2), sum_s=1.5),
    Limits(message_bytes=65536, canvas_tokens=256, steps=1024, window=3, top_k=64, queue_size=32),
    Limits(1, 2, 3, 4, 5, 6, words=3, images=3, image_bytes=196_608, guidance=1.5),
    Info(
        v=2,
        version="0.1.0",
        model="tinystories@01",
        backend="trt",
        deterministic=True,
        decoders=["blocks"],
        limits=Limits(1, 2, 3, 4, 5, 6),
        schemas={"x": {"type": "object"}},
    ),
    Health(v=2, state="error", queued=2, model="tinystories@01", backend="trt", version="0.1.0", failure="it burns"),
)
"""Several requests, because `prompt` excludes `segments`, and fields of one decoder those of the other."""

CLASSES = [
    kind
    for module in (messages, metrics)
    for name, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, Struct) and kind.__module__ == module.__name__ and not name.startswith("_")
]


def examples_of(kind: type[Struct]) -> list[Struct]:
    return [example for example in EXAMPLES if type(example) is kind]


@pytest.mark.parametrize("kind", CLASSES)
def test_messages_examples_set_every_field(kind: type[Struct]) -> None:
    """Otherwise a field added later would be swept by nothing."""
    assert examples_of(kind), f"add an example of {kind.__name__} above"
    for field in msgspec.structs.fields(kind):
        assert any(getattr(example, field.name) != field.default for example in examples_of(kind)), field.name


@pytest.mark.parametrize("kind", CLASSES)
def test_messages_come_back_as_they_were_sent(kind: type[Struct]) -> None:
    for example in examples_of(kind):
        line = encode(example)
        assert b"\n" not in line  # one message, one line
        assert msgspec.json.decode(line, type=kind) == example


@pytest.mark.parametrize("kind", CLASSES)
def test_messages_with_an_unknown_field_are_refused_by_name(kind: type[Struct]) -> None:
    for example in examples_of(kind):
        wire: dict[str, Any] = msgspec.json.decode(encode(example))
        with pytest.raises(msgspec.ValidationError, match="unknown field `surprise`"):
            msgspec.json.decode(msgspec.json.encode(wire | {"surprise": 1}), type=kind)


@pytest.mark.parametrize("kind", CLASSES)
def test_messages_cannot_change(kind: type[Struct]) -> None:
    for example in examples_of(kind):
        for field in kind.__struct_fields__:
            with pytest.raises(AttributeError, match="immutable"):
                setattr(example, field, None)


@pytest.mark.parametrize("kind", [Response, Partial, Health])
def test_messages_are_told_apart_by_their_type(kind: type[Struct]) -> None:
    for example in examples_of(kind):
        assert msgspec.json.decode(encode(example), type=Reply) == example
