"""Topics below `edgelm/<device>/`, what a message on them may say, and where an answer may go."""

import re
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from msgspec import Struct
from paho.mqtt.client import MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from shared.errors import RequestError
from shared.manifest import MAX_STEPS
from shared.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    CancelRequest,
    GenerateRequest,
    Health,
    Info,
    Limits,
    decode_request,
)

MAX_TOPIC: Final = 256
MAX_LEVELS: Final = 16
OWN: Final = frozenset({"request", "availability", "state", "info", "metrics", "stream"})
"""Topics of a device that no answer may be sent to."""

_NONCHARACTERS: Final = "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
UNSENDABLE: Final = re.compile(f"[+#\x00-\x1f\x7f-\x9f\ufdd0-\ufdef{_NONCHARACTERS}]")
"""Wildcards, and characters at which a broker may drop the connection: one bad topic would then end every answer."""


@dataclass(frozen=True)
class Topics:
    """Those of one device. reply_prefixes: what the topics that answers are sent to must begin with."""

    device: str
    reply_prefixes: tuple[str, ...]

    def own(self, kind: str, id: str | None = None) -> str:
        """edgelm/<device>/<kind>, and below it the id if there is one that a topic can carry."""
        base = f"edgelm/{self.device}/{kind}"
        return base if id is None or UNSENDABLE.search(id) else f"{base}/{id}"

    def may_answer_on(self, topic: str) -> bool:
        """Whether a client may direct answers there: otherwise anyone could publish with the daemon's rights."""
        levels = topic.split("/")
        third = levels[2] if levels[2:] else ""
        spoofs = third != "response" if topic.startswith(self.own("")) else levels[0] == "edgelm" and third in OWN
        return (
            topic.startswith(self.reply_prefixes)
            and not spoofs
            and len(topic) <= MAX_TOPIC
            and len(levels) <= MAX_LEVELS
            and UNSENDABLE.search(topic) is None
        )

    def address(self, asked: str | None, id: str | None) -> tuple[str, RequestError | None]:
        """Where an answer goes, and what is wrong with where it was asked to go."""
        if asked is None:
            return self.own("response", id), None
        if self.may_answer_on(asked):
            return asked, None
        below = ", ".join(self.reply_prefixes)
        rule = f"answers go to topics below {below} that no device uses for itself, but for its own response topics"
        error = RequestError("bad_reply_topic", f"{rule}; not to {asked!r}")
        return self.own("response", id), error


class _Told(Struct):
    status: str


def sent_with(message: MQTTMessage, name: str) -> Any:
    """A property of MQTT 5, if the message has it."""
    return getattr(message.properties, name, None)


def answer_properties(payload: bytes, correlation: bytes | None) -> Properties:
    """What an answer carries: its sender's correlation data, and its status for those who do not read JSON."""
    status = msgspec.json.decode(payload, type=_Told).status
    told = [("v", str(PROTOCOL_VERSION)), ("status", status), ("final", "true")]
    echo = {} if correlation is None else {"CorrelationData": correlation}
    return json_properties(UserProperty=told, **echo)


def partial_properties(seq: int, correlation: bytes | None) -> Properties:
    """What a snapshot carries: the same, and its number."""
    echo = {} if correlation is None else {"CorrelationData": correlation}
    return json_properties(UserProperty=[("v", str(PROTOCOL_VERSION)), ("seq", str(seq)), ("final", "false")], **echo)


def json_properties(**more: Any) -> Properties:
    """Those of a JSON message."""
    return properties(PacketTypes.PUBLISH, ContentType="application/json", PayloadFormatIndicator=1, **more)


def properties(packet: int, **values: Any) -> Properties:
    """Properties of a packet, by name."""
    made = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(made, name, value)
    return made


def decode_generate(payload: bytes) -> GenerateRequest:
    """A JSON object, or plain text as the prompt. Raises RequestError."""
    if payload.lstrip().startswith(b"{"):
        return decode_request(payload)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise RequestError("too_large", f"a message may have {MAX_MESSAGE_BYTES} bytes; this one has {len(payload)}")
    if not payload:
        raise RequestError("bad_request", 'an empty message asks for nothing; send {"prompt": ""} for a free story')
    try:
        return GenerateRequest(prompt=payload.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError("bad_request", f"the prompt is not UTF-8: {error.reason} at byte {error.start}") from None


def info(health: Health, canvas_len: int, top_k: int, queue_size: int) -> Info:
    """What a client may want to know before it asks, with the JSON schema of its requests."""
    limits = Limits(MAX_MESSAGE_BYTES, canvas_len, MAX_STEPS, top_k, queue_size)
    schemas = {"generate": GenerateRequest, "cancel": CancelRequest}
    return Info(
        version=health.version,
        model=health.model,
        backend=health.backend,
        limits=limits,
        schemas={name: _schema(kind) for name, kind in schemas.items()},
    )


def _schema(kind: Any) -> dict[str, Any]:
    text = msgspec.json.encode(msgspec.json.schema(kind))
    schema: dict[str, Any] = msgspec.json.decode(text.replace(rb"\\Z", b"$"))  # Python's end of text, in their dialect
    return schema
