"""What comes of a request on a client's own topic stays with that client."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import MQTTMessage

from tests.integration.harness import Broker, Daemon, Listener

BASE = "edgelm/dev"
REQUEST = f"{BASE}/request/generate"
CANCEL = f"{BASE}/request/cancel"
STORY = {"prompt": "Once upon a time", "steps": 30}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, debug_bundle: Path) -> Iterator[Broker]:
    """A broker with a daemon named `dev`, a step of which takes 20 ms: for tests that leave it as they found it."""
    folder = tmp_path_factory.mktemp("site")
    broker = Broker(folder).start()
    daemon = Daemon(folder, debug_bundle, "--backend", "fake:20", "--mqtt", broker.address, DEVICE="dev")
    assert broker.tool("mosquitto_sub", "-t", f"{BASE}/availability", "-C", "1", "-W", "20") == "online\n"
    yield broker
    daemon.close()
    broker.stop()


@pytest.fixture
def listener(site: Broker, listen: Callable[..., Listener]) -> Listener:
    return listen(site)


def body(message: MQTTMessage) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(message.payload)
    return decoded


def test_mqtt_trust_answers_and_streams_below_the_clients_own_topics(listener: Listener) -> None:
    listener.publish(f"{REQUEST}/alice", STORY | {"id": "1", "stream": True})
    assert body(listener.next(f"{BASE}/stream/alice/1"))["id"] == "1"
    assert body(listener.next(f"{BASE}/response/alice/1"))["status"] == "ok"
    listener.publish(f"{BASE}/request/health/alice", b"")
    assert body(listener.next(f"{BASE}/response/alice/health"))["type"] == "health"
    listener.publish(f"{REQUEST}/alice", b"{")
    assert body(listener.next(f"{BASE}/response/alice"))["error"]["code"] == "bad_request"


@pytest.mark.parametrize("topic", [f"{BASE}/response/alice/x", "edgelm/reply/alice", "edgelm/reply/alice/1"])
def test_mqtt_trust_answers_where_a_client_says_below_its_own_topics(listener: Listener, topic: str) -> None:
    listener.publish(f"{REQUEST}/alice", {"prompt": "Once", "max_tokens": 1}, ResponseTopic=topic)
    assert body(listener.next(topic))["status"] == "ok"


OTHERS = [
    f"{BASE}/response/bob/1",
    f"{BASE}/response/1",
    f"{BASE}/response",
    "edgelm/reply/bob/1",
    "edgelm/reply/alicea",
    "edgelm/other/response/alice/1",
]


@pytest.mark.parametrize("topic", OTHERS)
def test_mqtt_trust_sends_no_answer_into_anothers_topics(listener: Listener, topic: str) -> None:
    listener.publish(f"{REQUEST}/alice", {"id": "x", "prompt": "Once"}, ResponseTopic=topic)
    assert body(listener.next(f"{BASE}/response/alice/x"))["error"]["code"] == "bad_reply_topic"


@pytest.mark.parametrize("topic", ["edgelm/other/response/x", f"{BASE}/response/alice/1", f"{BASE}/response/a/b/c"])
def test_mqtt_trust_holds_for_senders_on_the_plain_topic(listener: Listener, topic: str) -> None:
    listener.publish(REQUEST, {"id": "y", "prompt": "Once"}, ResponseTopic=topic)
    assert body(listener.next(f"{BASE}/response/y"))["error"]["code"] == "bad_reply_topic"


@pytest.mark.slow
def test_mqtt_trust_keeps_the_ids_of_clients_apart(listener: Listener) -> None:
    """Also where both name the same reply topic, as one of them can on the plain topic."""
    listener.publish(REQUEST, {"id": "same", "prompt": "Once", "max_tokens": 1}, ResponseTopic="edgelm/reply/alice/1")
    assert body(listener.next("edgelm/reply/alice/1"))["status"] == "ok"
    for client in ("alice", "bob"):
        topic = f"edgelm/reply/{client}/1"
        listener.publish(f"{REQUEST}/{client}", {"id": "same", "prompt": client}, ResponseTopic=topic)
        answer = body(listener.next(topic))
        assert answer["status"] == "ok" and answer["text"].startswith(client)


@pytest.mark.parametrize("sender", ["/bob", ""])
def test_mqtt_trust_lets_nobody_cancel_anothers_request(listener: Listener, sender: str) -> None:
    id = f"kept from {sender or 'plain'}".replace("/", "")
    listener.publish(f"{REQUEST}/alice", STORY | {"id": id, "stream": True})
    listener.next(f"{BASE}/stream/alice/{id}")
    listener.publish(f"{CANCEL}{sender}", {"id": id})
    assert body(listener.next(f"{BASE}/response/alice/{id}"))["status"] == "ok"


def test_mqtt_trust_lets_a_client_cancel_its_own_request(listener: Listener) -> None:
    listener.publish(f"{REQUEST}/alice", STORY | {"id": "c", "stream": True, "steps": 200})
    listener.next(f"{BASE}/stream/alice/c")
    listener.publish(f"{CANCEL}/alice", {"id": "c"})
    assert body(listener.next(f"{BASE}/response/alice/c"))["status"] == "cancelled"
