"""What else a daemon says and takes over MQTT: cancel, health, state, info, metrics, expiry."""

import json
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from paho.mqtt.client import MQTTMessage

from edge.config import MqttConfig
from edge.transports.mqtt.link import Link
from tests.integration.harness import Broker, Daemon, Listener

BASE = "edgelm/dev"
REQUEST = f"{BASE}/request/generate"
STORY = {"prompt": "Once upon a time"}
Listen = Callable[..., Listener]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, debug_bundle: Path) -> Iterator[Broker]:
    """A broker with a daemon named `dev`, a step of which takes 20 ms: for tests that leave it as they found it."""
    folder = tmp_path_factory.mktemp("site")
    broker = Broker(folder).start()
    daemon = Daemon(folder, debug_bundle, "--backend", "fake:20", "--mqtt", broker.address, DEVICE="dev")
    assert broker.tool("mosquitto_sub", "-t", f"{BASE}/availability", "-C", "1", "-W", "20") == "online\n"
    assert broker.tool("mosquitto_sub", "-t", f"{BASE}/info", "-C", "1", "-W", "20")
    yield broker
    daemon.close()
    broker.stop()


@pytest.fixture
def listener(site: Broker, listen: Listen) -> Listener:
    return listen(site)


def body(message: MQTTMessage) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(message.payload)
    return decoded


def begin(listener: Listener, id: str, **properties: Any) -> None:
    """A story that is under way."""
    listener.publish(REQUEST, STORY | {"id": id, "stream": True}, **properties)
    listener.next(f"{BASE}/stream/{id}")


def test_mqtt_cancelled_request_ends_at_its_next_step(listener: Listener) -> None:
    begin(listener, "c1")
    listener.publish(f"{BASE}/request/cancel", {"id": "c1"})
    answer = body(listener.next(f"{BASE}/response/c1"))
    assert answer["status"] == "cancelled" and answer["error"]["code"] == "cancelled"
    listener.publish(REQUEST, STORY | {"id": "c1", "stream": True})
    assert body(listener.next(f"{BASE}/response/c1")) == answer  # its one answer


def test_mqtt_cancel_with_an_address_stops_the_one_answered_there(listener: Listener) -> None:
    begin(listener, "c2", ResponseTopic="edgelm/reply/me")
    listener.publish(REQUEST, STORY | {"id": "c2"}, ResponseTopic="edgelm/reply/you")
    listener.publish(f"{BASE}/request/cancel", {"id": "c2"}, ResponseTopic="edgelm/reply/me")
    assert body(listener.next("edgelm/reply/me"))["status"] == "cancelled"
    assert body(listener.next("edgelm/reply/you"))["status"] == "ok"


def test_mqtt_cancel_that_cannot_be_read_is_answered(listener: Listener) -> None:
    listener.publish(f"{BASE}/request/cancel", {"id": "c3", "why": "bored"})
    assert "why" in body(listener.next(f"{BASE}/response/c3"))["error"]["message"]


def test_mqtt_health_is_answered_while_a_request_is_computed(listener: Listener) -> None:
    begin(listener, "h")
    listener.publish(f"{BASE}/request/health", b"", ResponseTopic="edgelm/reply/me", CorrelationData=b"7")
    message = listener.next("edgelm/reply/me")
    assert body(message)["state"] == "busy" and body(message)["model"].startswith("debug@")
    assert message.properties.CorrelationData == b"7"  # type: ignore[union-attr]
    listener.next(f"{BASE}/response/h")


def test_mqtt_health_has_a_topic_of_its_own_for_those_who_name_none(site: Broker, listener: Listener) -> None:
    site.tool("mosquitto_pub", "-V", "311", "-t", f"{BASE}/request/health", "-n")
    assert body(listener.next(f"{BASE}/response/health"))["type"] == "health"


def test_mqtt_health_goes_no_further_than_answers_do(listener: Listener) -> None:
    listener.publish(f"{BASE}/request/health", b"", ResponseTopic="other/topic")
    assert body(listener.next(f"{BASE}/response/health"))["error"]["code"] == "bad_reply_topic"


def test_mqtt_request_expires_with_its_message(listener: Listener) -> None:
    listener.publish(REQUEST, STORY | {"id": "e", "steps": 200}, MessageExpiryInterval=1)
    assert body(listener.next(f"{BASE}/response/e"))["error"]["code"] == "timeout"


@pytest.mark.parametrize("topic", ["state", "info", "metrics", "stream/x"])
def test_mqtt_answers_are_not_sent_where_the_daemon_speaks_for_itself(listener: Listener, topic: str) -> None:
    for device in ("dev", "other"):
        listener.publish(REQUEST, {"id": "spoof", "prompt": "x"}, ResponseTopic=f"edgelm/{device}/{topic}")
        assert body(listener.next(f"{BASE}/response/spoof"))["error"]["code"] == "bad_reply_topic"


def test_mqtt_info_tells_what_requests_may_be(listener: Listener, debug_bundle: Path) -> None:
    message = listener.next(f"{BASE}/info")
    manifest = json.loads((debug_bundle / "manifest.json").read_text())
    info = body(message)
    assert message.retain and info["model"].startswith("debug@")
    assert (info["backend"], info["deterministic"]) == ("fake", True)
    assert info["limits"]["canvas_tokens"] == manifest["model"]["canvas_len"]
    generate = info["schemas"]["generate"]["$defs"]["GenerateRequest"]
    assert generate["properties"]["temperature"]["anyOf"][0]["maximum"] == 10
    assert generate["additionalProperties"] is False
    assert "\\Z" not in bytes(message.payload).decode()  # no dialect but Python's knows it


@pytest.mark.slow
def test_mqtt_state_follows_the_work(listener: Listener) -> None:
    """The daemon looks twice a second: the story must take longer."""
    listener.publish(REQUEST, STORY | {"id": "s", "steps": 200})
    while body(message := listener.next(f"{BASE}/state"))["state"] != "busy":
        pass
    while body(message := listener.next(f"{BASE}/state"))["state"] != "idle":
        pass
    assert body(message)["queued"] == 0


def test_mqtt_metrics_come_when_the_daemon_does_and_state_ends_with_it(
    start_daemon: Callable[..., Daemon], site: Broker, listener: Listener
) -> None:
    daemon = start_daemon("--mqtt", site.address, DEVICE="second")
    metrics = body(listener.next("edgelm/second/metrics"))
    assert metrics["accepted"] == 0 and metrics["resident_mb"] > 10
    daemon.signal(signal.SIGTERM)
    while body(listener.next("edgelm/second/state"))["state"] != "draining":
        pass
    assert daemon.exit_code() == 0


def test_mqtt_link_sends_small_packets_at_once(broker: Broker) -> None:
    """Else an answer waits for 40 ms behind the acknowledgement of its request."""
    config = MqttConfig(host="127.0.0.1", port=broker.port)
    link = Link(config, "dev", topics=[], pool=[], availability="edgelm/dev/availability", events=cast("Any", None))
    client = link._make_client()
    client.connect("127.0.0.1", broker.port)
    opened = cast("socket.socket", client.socket())
    assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
    opened.close()
