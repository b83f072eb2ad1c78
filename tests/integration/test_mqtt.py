"""Requests and answers over MQTT: a real daemon behind a real mosquitto, asked by mosquitto's tools and by paho."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import MQTTMessage

from edge.serving.job import EARLY_SNAPSHOTS
from shared.messages import MAX_MESSAGE_BYTES
from tests.integration.harness import TIMEOUT_S, Broker, Daemon, Listener

REQUEST = "edgelm/dev/request/generate"
AVAILABILITY = "edgelm/dev/availability"


@dataclass(frozen=True)
class Site:
    """A broker, and a daemon named `dev` that said it is online; a step takes it 10 ms."""

    broker: Broker
    daemon: Daemon


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, debug_bundle: Path) -> Iterator[Site]:
    """One for all tests of this file: they leave it as they found it."""
    folder = tmp_path_factory.mktemp("site")
    broker = Broker(folder).start()
    daemon = Daemon(folder, debug_bundle, "--backend", "fake:10", "--mqtt", broker.address, DEVICE="dev")
    assert broker.tool("mosquitto_sub", "-t", AVAILABILITY, "-C", "1", "-W", "20") == "online\n"
    yield Site(broker, daemon)
    daemon.close()
    broker.stop()


@pytest.fixture
def listener(site: Site, listen: Callable[..., Listener]) -> Listener:
    """Hears everything below edgelm/."""
    return listen(site.broker)


def body(message: MQTTMessage) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(message.payload)
    return decoded


def carried(message: MQTTMessage, name: str) -> object:
    """A property of MQTT 5."""
    return getattr(message.properties, name)


def test_mqtt_plain_text_is_the_prompt(site: Site, listener: Listener) -> None:
    site.broker.tool("mosquitto_pub", "-t", REQUEST, "-m", "Once upon a time")

    reply = body(listener.next("edgelm/dev/response"))
    assert reply["status"] == "ok" and reply["text"].startswith("Once upon a time")


def test_mqtt_request_response_tool_gets_the_final_answer_alone(site: Site) -> None:
    request = '{"id": "rr", "prompt": "Once", "stream": true}'
    flags = ["-V", "5", "-q", "1", "-W", "20"]
    out = site.broker.tool("mosquitto_rr", *flags, "-t", REQUEST, "-e", "edgelm/reply/me", "-m", request)

    assert json.loads(out)["status"] == "ok" and json.loads(out)["id"] == "rr"


def test_mqtt_answer_carries_what_the_sender_needs_to_place_it(listener: Listener) -> None:
    request = {"prompt": "Once", "max_tokens": 1}
    listener.publish(REQUEST, request, ResponseTopic="edgelm/reply/me", CorrelationData=b"\x00\xff42")

    message = listener.next("edgelm/reply/me")
    assert body(message)["status"] == "ok"
    assert message.qos == 1 and not message.retain
    assert carried(message, "CorrelationData") == b"\x00\xff42"
    assert carried(message, "ContentType") == "application/json"


def test_mqtt_client_of_3_1_1_is_answered_under_its_id(site: Site, listener: Listener) -> None:
    site.broker.tool("mosquitto_pub", "-V", "311", "-t", REQUEST, "-m", '{"id": "1", "prompt": "x", "max_tokens": 1}')
    assert body(listener.next("edgelm/dev/response/1"))["status"] == "ok"


def test_mqtt_3_1_1_request_names_its_reply_topic(site: Site, listener: Listener) -> None:
    request = '{"id": "2", "prompt": "x", "max_tokens": 1, "response_topic": "edgelm/reply/me"}'
    site.broker.tool("mosquitto_pub", "-V", "311", "-t", REQUEST, "-m", request)
    assert body(listener.next("edgelm/reply/me"))["id"] == "2"


def test_mqtt_snapshots_go_to_the_stream_topic_at_a_bounded_rate(listener: Listener) -> None:
    started_s = time.monotonic()
    listener.publish(REQUEST, {"id": "s", "prompt": "Once", "stream": True}, CorrelationData=b"me")

    partials = []
    while (message := listener.heard.get(timeout=TIMEOUT_S)).topic != "edgelm/dev/response/s":
        if message.topic == "edgelm/dev/stream/s":
            partials.append(message)
    assert 1 <= len(partials) <= EARLY_SNAPSHOTS + 1 + 5 * (time.monotonic() - started_s)
    assert all(partial.qos == 0 and not partial.retain for partial in partials)
    assert carried(partials[0], "UserProperty") == [("v", "1"), ("seq", "1"), ("final", "false")]
    assert all(carried(partial, "CorrelationData") == b"me" for partial in partials)
    first = body(partials[0])
    assert first["type"] == "partial" and first["text"].startswith("Once") and "░" in first["text"]
    assert first["parts"][0]["text"].startswith("Once") and any(part.get("draft") for part in first["parts"])
    assert body(message)["status"] == "ok"


FORBIDDEN = ["other/topic", AVAILABILITY, REQUEST, "edgelm/other/request/generate", "edgelm/other/availability"]


@pytest.mark.parametrize("topic", FORBIDDEN)
def test_mqtt_answers_are_not_sent_just_anywhere(listener: Listener, topic: str) -> None:
    listener.publish(REQUEST, {"id": "x", "prompt": "Once"}, ResponseTopic=topic)

    reply = body(listener.next("edgelm/dev/response/x"))
    assert reply["error"]["code"] == "bad_reply_topic" and topic in reply["error"]["message"]


UNSENDABLE = ["edgelm/+/x", "edgelm/#", "$SYS/x", "", "edgelm/\x7f", "edgelm" + "/x" * 300]


@pytest.mark.parametrize("topic", UNSENDABLE, ids=["plus", "hash", "dollar", "none", "control", "too deep"])
def test_mqtt_reply_topics_that_no_broker_takes_are_refused(listener: Listener, topic: str) -> None:
    listener.publish(REQUEST, {"id": "x", "prompt": "Once", "response_topic": topic})
    assert body(listener.next("edgelm/dev/response/x"))["error"]["code"] == "bad_reply_topic"


def test_mqtt_id_that_no_topic_can_carry_is_answered_without_it(listener: Listener) -> None:
    # mosquitto drops a client that publishes to such a topic; sent again at every connect, it would end all answers.
    listener.publish(REQUEST, {"id": "\x85\U0001fffe", "prompt": "Once", "max_tokens": 1})
    assert body(listener.next("edgelm/dev/response"))["id"] == "\x85\U0001fffe"


BAD_PAYLOADS: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b"\xff\xfe", "bad_request"),
    "empty": (b"", "bad_request"),
    "not JSON": (b"  {not json", "bad_request"),
    "unknown field": (b'{"prompt": "x", "promt": "y"}', "bad_request"),
    "long text": (b"x" * (MAX_MESSAGE_BYTES + 1), "too_large"),
    "long JSON": (b'{"prompt": "' + b"x" * MAX_MESSAGE_BYTES + b'"}', "too_large"),
}


@pytest.mark.parametrize(("payload", "code"), BAD_PAYLOADS.values(), ids=BAD_PAYLOADS.keys())
def test_mqtt_bad_payloads_are_answered_where_the_sender_listens(listener: Listener, payload: bytes, code: str) -> None:
    listener.publish(REQUEST, payload, ResponseTopic="edgelm/reply/me", CorrelationData=b"7")

    message = listener.next("edgelm/reply/me")
    assert body(message)["error"]["code"] == code
    assert carried(message, "CorrelationData") == b"7"


def test_mqtt_bad_request_of_a_3_1_1_client_is_answered_under_its_id(site: Site, listener: Listener) -> None:
    site.broker.tool("mosquitto_pub", "-V", "311", "-t", REQUEST, "-m", '{"id": "b", "promt": "x"}')
    assert body(listener.next("edgelm/dev/response/b"))["error"]["code"] == "bad_request"
