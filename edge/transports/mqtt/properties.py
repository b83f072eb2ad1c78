"""Properties of MQTT 5 messages."""

from typing import Any

import msgspec
from msgspec import Struct
from paho.mqtt.client import MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from shared.messages import PROTOCOL_VERSION


class _Answered(Struct):
    status: str | None = None  # health has none


def sent_with(message: MQTTMessage, name: str) -> Any:
    """A property of a message, if it has it."""
    return getattr(message.properties, name, None)


def answer_properties(payload: bytes, correlation: bytes | None) -> Properties:
    """Properties of an answer: its request's correlation data, and its status for clients that do not read JSON."""
    status = msgspec.json.decode(payload, type=_Answered).status
    user = [("v", str(PROTOCOL_VERSION)), *([] if status is None else [("status", status)]), ("final", "true")]
    echo = {} if correlation is None else {"CorrelationData": correlation}
    return json_properties(UserProperty=user, **echo)


def partial_properties(seq: int, correlation: bytes | None) -> Properties:
    """Properties of a snapshot: correlation data and its number."""
    echo = {} if correlation is None else {"CorrelationData": correlation}
    return json_properties(UserProperty=[("v", str(PROTOCOL_VERSION)), ("seq", str(seq)), ("final", "false")], **echo)


def json_properties(**more: Any) -> Properties:
    """Properties of a JSON message."""
    return properties(PacketTypes.PUBLISH, ContentType="application/json", PayloadFormatIndicator=1, **more)


def properties(packet: int, **values: Any) -> Properties:
    """Properties of a packet, by name."""
    made = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(made, name, value)
    return made
