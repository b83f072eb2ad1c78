"""What a publisher can make the daemon keep, send and wait for is bounded."""

import json
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import MQTTMessage

from edge.delivery.reply_limits import BURST, MAX_REPLIES
from edge.transports.mqtt.link import RECEIVE_MAXIMUM
from tests.integration.harness import TIMEOUT_S, Broker, Daemon, Listener, until
from tests.stress.soak import resources
from tests.support.flood import flood

REQUEST = "edgelm/dev/request/generate"
HONEST = "edgelm/reply/honest"
Listen = Callable[..., Listener]


@pytest.fixture
def serve(start_daemon: Callable[..., Daemon]) -> Callable[..., Daemon]:
    """Start a daemon named `dev` on a broker."""

    def start(broker: Broker, backend: str = "fake") -> Daemon:
        daemon = start_daemon("--mqtt", broker.address, backend=backend, DEVICE="dev")
        until(lambda: "mqtt connected" in daemon.log.read_text(), "the daemon to connect")
        return daemon

    return start


def body(message: MQTTMessage) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(message.payload)
    return decoded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        (REQUEST, b'{"prompt": ' + b"x" * 909),
        (REQUEST, b'{"id": "one", "prompt": "Once", "max_tokens": 1}'),
        ("edgelm/dev/request/health", b""),
        ("edgelm/dev/request/cancel", b"x" * 920),
    ],
    ids=["invalid", "asked again", "health", "cancel"],
)
def test_mqtt_qos_0_flood_stays_in_bounds_while_others_are_served(
    serve: Callable[..., Daemon], make_broker: Callable[..., Broker], listen: Listen, topic: str, payload: bytes
) -> None:
    broker = make_broker("max_queued_messages 0").start()
    daemon = serve(broker)
    listener = listen(broker, HONEST)
    before_kb = resources(daemon.process.pid).resident_kb
    flooding = threading.Thread(target=flood, args=(broker.port, topic, payload, 3000, 5.0))
    flooding.start()
    time.sleep(2.0)
    began_s = time.monotonic()
    listener.publish(REQUEST, {"id": "h", "prompt": "Once", "max_tokens": 1}, ResponseTopic=HONEST)
    assert body(listener.next(HONEST))["status"] == "ok"
    assert time.monotonic() - began_s < 10.0
    flooding.join()
    assert resources(daemon.process.pid).resident_kb - before_kb < 16 * 1024
    metrics = broker.tool("mosquitto_sub", "-t", "edgelm/dev/state", "-C", "1", "-W", "5")
    assert json.loads(metrics)["type"] == "health"


def test_mqtt_qos_0_client_is_told_so_much_a_second_and_the_rest_is_counted(
    serve: Callable[..., Daemon], broker: Broker, listen: Listen
) -> None:
    daemon = serve(broker)
    listener = listen(broker, "edgelm/dev/#")
    sent = flood(broker.port, REQUEST, b"{", 500, 1.0)
    listener.publish(REQUEST, {"id": "last", "prompt": "Once", "max_tokens": 1})
    replies, metrics = 0, {"dropped": 0}
    while (message := listener.heard.get(timeout=TIMEOUT_S)).topic != "edgelm/dev/response/last":
        replies += message.topic == "edgelm/dev/response"
    daemon.signal(signal.SIGTERM)  # the last it says is its counters
    while (message := listener.heard.get(timeout=TIMEOUT_S)).payload != b"offline":
        replies += message.topic == "edgelm/dev/response"
        metrics = body(message) if message.topic == "edgelm/dev/metrics" else metrics
    assert BURST - MAX_REPLIES < replies <= BURST + 40
    assert replies + metrics["dropped"] == sent


def test_mqtt_every_bad_request_of_qos_1_is_answered(
    serve: Callable[..., Daemon], make_broker: Callable[..., Broker], listen: Listen
) -> None:
    broker = make_broker("max_queued_messages 0").start()
    serve(broker)
    listener = listen(broker, "edgelm/dev/response")
    for _ in range(10 * RECEIVE_MAXIMUM):
        listener.client.publish(REQUEST, b"{", qos=1)
    for _ in range(10 * RECEIVE_MAXIMUM):
        assert body(listener.next("edgelm/dev/response"))["error"]["code"] == "bad_request"


@pytest.mark.slow
def test_mqtt_what_has_no_room_for_a_refusal_stays_with_the_broker_and_is_answered_later(
    make_broker: Callable[..., Broker], tmp_path: Path, debug_bundle: Path, listen: Listen
) -> None:
    """A daemon that holds four replies at most: in an overload mosquitto 2.0 delivers far more than it was told to."""
    broker = make_broker("max_queued_messages 0").start()
    few = ("-m", "tests.support.few_replies", "4")
    daemon = Daemon(tmp_path, debug_bundle, "--backend", "fake", "--mqtt", broker.address, DEVICE="dev", program=few)
    try:
        until(lambda: "mqtt connected" in daemon.log.read_text(), "the daemon to connect")
        listener = listen(broker, "edgelm/dev/response/#")
        ids = {str(number) for number in range(12)}
        daemon.signal(signal.SIGSTOP)  # so that they come at once
        for id in ids:
            listener.client.publish(REQUEST, json.dumps({"id": id, "prompt": 1}).encode(), qos=1)
        daemon.signal(signal.SIGCONT)
        told = set[str]()
        while told != ids:
            answer = body(listener.heard.get(timeout=TIMEOUT_S))
            assert answer["error"]["code"] == "bad_request"
            told.add(answer["id"])
        assert "connecting anew" in daemon.log.read_text()
        assert daemon.log.read_text().count("mqtt connected") > 1 and "another client" not in daemon.log.read_text()
    finally:
        daemon.close()


def test_mqtt_correlation_data_is_bounded(serve: Callable[..., Daemon], broker: Broker, listen: Listen) -> None:
    serve(broker)
    listener = listen(broker, HONEST)
    listener.publish(REQUEST, {"prompt": "x"}, ResponseTopic=HONEST, CorrelationData=b"x" * 1025)
    reply = listener.next(HONEST)
    assert body(reply)["error"]["code"] == "too_large" and "1024" in body(reply)["error"]["message"]
    listener.publish(REQUEST, {"prompt": "x"}, ResponseTopic=HONEST, CorrelationData=b"x" * 1024)
    assert body(listener.next(HONEST))["status"] == "ok"


def test_mqtt_what_the_broker_takes_no_packet_for_is_given_up_and_the_rest_is_served(
    serve: Callable[..., Daemon], make_broker: Callable[..., Broker], listen: Listen
) -> None:
    """Here, the description of the daemon, and an answer with much correlation data."""
    broker = make_broker("max_packet_size 1400").start()
    daemon = serve(broker)
    listener = listen(broker, HONEST)
    large = {"id": "large", "prompt": "Once upon a time, " * 8, "max_tokens": 100}
    listener.publish(REQUEST, large, ResponseTopic=HONEST, CorrelationData=b"x" * 1000)
    until(lambda: "giving up the answer" in daemon.log.read_text(), "the answer to be given up")
    assert re.search(r"edgelm/reply/honest, .*: \d+ bytes, and broker .* takes 1400", daemon.log.read_text())
    listener.publish(REQUEST, {"id": "small", "prompt": "Once", "max_tokens": 1}, ResponseTopic=HONEST)
    assert body(listener.next(HONEST))["id"] == "small"
    assert "is lost" not in daemon.log.read_text()
    listener.publish(REQUEST, large, ResponseTopic=HONEST)  # asked for with less around it
    assert body(listener.next(HONEST))["id"] == "large"
