"""What was accepted is answered, once and the same again, whatever dies meanwhile."""

import json
import os
import queue
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import MQTTMessage

from tests.integration.harness import TIMEOUT_S, Broker, Daemon, Listener, until

REQUEST = "edgelm/dev/request/generate"
RESPONSE = "edgelm/dev/response"
AVAILABILITY = "edgelm/dev/availability"
STORY = {"prompt": "Once upon a time", "steps": 20}
Serve = Callable[..., Daemon]
Listen = Callable[..., Listener]


@pytest.fixture
def serve(start_daemon: Callable[..., Daemon], broker: Broker) -> Serve:
    """Start a daemon named `dev` on the broker. It keeps the folder of the one before it."""

    started = 0

    def start(backend: str = "fake", **settings: str) -> Daemon:
        nonlocal started
        started += 1
        daemon = start_daemon("--mqtt", broker.address, backend=backend, **({"DEVICE": "dev"} | settings))
        until(lambda: daemon.log.read_text().count("mqtt connected") == started, "the daemon to connect")
        return daemon

    return start


@pytest.fixture
def listener(broker: Broker, listen: Listen) -> Listener:
    return listen(broker)


def kill(daemon: Daemon) -> None:
    daemon.signal(signal.SIGKILL)
    daemon.exit_code()


def body(message: MQTTMessage) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(message.payload)
    return decoded


def quiet(listener: Listener, topic: str, seconds: float = 1.0) -> bool:
    """Whether nothing comes on a topic for a while."""
    try:
        while listener.heard.get(timeout=seconds).topic != topic:
            pass
    except queue.Empty:
        return True
    return False


@pytest.mark.slow
def test_mqtt_what_a_killed_daemon_accepted_its_successor_answers_once(serve: Serve, listener: Listener) -> None:
    daemon = serve(backend="fake:50")
    for i in range(5):
        listener.publish(REQUEST, STORY | {"id": str(i), "stream": True})
    listener.next("edgelm/dev/stream/0")
    kill(daemon)
    serve()
    answers: dict[str, list[bytes]] = {}
    while len(answers) < 5:
        message = listener.heard.get(timeout=TIMEOUT_S)
        if message.topic.startswith(RESPONSE):
            answers.setdefault(message.topic, []).append(bytes(message.payload))
    assert all(json.loads(payload)["status"] == "ok" for (payload,) in answers.values())
    assert quiet(listener, f"{RESPONSE}/4")


def test_mqtt_device_that_is_renamed_answers_what_it_accepted_before(serve: Serve, listener: Listener) -> None:
    """Where it was asked to: the journal belongs to the state folder, not to a name."""
    daemon = serve(backend="fake:50")
    listener.publish(REQUEST, STORY | {"id": "a", "stream": True})
    listener.next("edgelm/dev/stream/a")
    kill(daemon)
    serve(DEVICE="renamed")
    assert body(listener.next(f"{RESPONSE}/a"))["status"] == "ok"
    listener.publish("edgelm/renamed/request/generate", STORY | {"id": "b"})
    assert body(listener.next("edgelm/renamed/response/b"))["status"] == "ok"


def test_mqtt_its_text_is_the_one_it_would_have_been(serve: Serve, listener: Listener) -> None:
    """The seed was drawn when it was accepted."""
    daemon = serve(backend="fake:50")
    listener.publish(REQUEST, STORY | {"id": "a", "stream": True, "temperature": 2.0})
    listener.next("edgelm/dev/stream/a")
    kill(daemon)
    serve()
    first = body(listener.next(f"{RESPONSE}/a"))
    listener.publish(REQUEST, STORY | {"id": "b", "temperature": 2.0, "seed": first["seed"]})
    assert body(listener.next(f"{RESPONSE}/b"))["text"] == first["text"]


def test_mqtt_request_sent_again_gets_the_same_bytes(serve: Serve, listener: Listener) -> None:
    daemon = serve()
    request = {"id": "a", "prompt": "Once"}
    listener.publish(REQUEST, request, ResponseTopic="edgelm/reply/me", CorrelationData=b"1")
    first = listener.next("edgelm/reply/me")
    listener.publish(REQUEST, request, ResponseTopic="edgelm/reply/me", CorrelationData=b"2")
    again = listener.next("edgelm/reply/me")
    kill(daemon)
    serve()
    listener.publish(REQUEST, request, ResponseTopic="edgelm/reply/me", CorrelationData=b"3")
    after = listener.next("edgelm/reply/me")
    while after.properties.CorrelationData == b"2":  # type: ignore[union-attr]
        assert after.payload == again.payload  # the kill came before the broker had its acknowledgement
        after = listener.next("edgelm/reply/me")
    assert first.payload == again.payload == after.payload and body(first)["status"] == "ok"
    assert [m.properties.CorrelationData for m in (first, again, after)] == [b"1", b"2", b"3"]  # type: ignore[union-attr]
    assert ("status", "ok") in first.properties.UserProperty  # type: ignore[union-attr]


def test_mqtt_request_sent_again_while_it_is_computed_is_computed_once(serve: Serve, listener: Listener) -> None:
    serve(backend="fake:20")
    for _ in range(3):
        listener.publish(REQUEST, STORY | {"id": "a"})
    assert body(listener.next(f"{RESPONSE}/a"))["status"] == "ok"
    assert quiet(listener, f"{RESPONSE}/a")


def test_mqtt_id_that_was_given_away_is_a_conflict(serve: Serve, listener: Listener) -> None:
    serve()
    listener.publish(REQUEST, {"id": "a", "prompt": "Once"})
    first = listener.next(f"{RESPONSE}/a")
    listener.publish(REQUEST, {"id": "a", "prompt": "Twice"})
    conflict = body(listener.next(f"{RESPONSE}/a"))
    assert conflict["error"]["code"] == "conflict" and not conflict["error"].get("retryable", False)
    listener.publish(REQUEST, {"id": "a", "prompt": "Once"})
    assert listener.next(f"{RESPONSE}/a").payload == first.payload
    listener.publish(REQUEST, {"id": "a", "prompt": "Twice"}, ResponseTopic="edgelm/reply/me")
    assert body(listener.next("edgelm/reply/me"))["status"] == "ok"  # another address, another name


def test_mqtt_request_that_ended_two_daemons_is_not_given_to_a_third(serve: Serve, listener: Listener) -> None:
    for _ in range(2):
        daemon = serve(backend="fake:50")
        listener.publish(REQUEST, STORY | {"id": "poison", "stream": True})
        listener.next("edgelm/dev/stream/poison")
        kill(daemon)
    serve()
    answer = body(listener.next(f"{RESPONSE}/poison"))
    assert answer["error"]["code"] == "internal" and "ended 2 times" in answer["error"]["message"]
    listener.publish(REQUEST, {"id": "next", "prompt": "Once"})
    assert body(listener.next(f"{RESPONSE}/next"))["status"] == "ok"


@pytest.mark.slow
def test_mqtt_what_a_drain_cuts_off_is_finished_by_the_next_daemon(serve: Serve, listener: Listener) -> None:
    daemon = serve(backend="fake:50", DRAIN_S="0")
    listener.publish(REQUEST, STORY | {"id": "a", "stream": True})
    listener.next("edgelm/dev/stream/a")
    daemon.signal(signal.SIGTERM)
    assert daemon.exit_code() == 0
    serve()
    assert body(listener.next(f"{RESPONSE}/a"))["status"] == "ok"
    assert quiet(listener, f"{RESPONSE}/a")


def test_mqtt_requests_wait_at_the_broker_while_no_daemon_is_there(serve: Serve, listener: Listener) -> None:
    kill(serve())
    listener.publish(REQUEST, {"id": "a", "prompt": "Once"})
    serve()
    assert body(listener.next(f"{RESPONSE}/a"))["status"] == "ok"


def test_mqtt_broker_that_comes_back_without_memory_gets_the_answers(
    serve: Serve, broker: Broker, listener: Listener, listen: Listen
) -> None:
    daemon = serve(backend="fake:50")
    listener.publish(REQUEST, STORY | {"id": "a", "stream": True})
    listener.next("edgelm/dev/stream/a")
    broker.stop()
    until(lambda: "is lost" in daemon.log.read_text(), "the daemon to notice")
    line = daemon.line()
    until(lambda: line.ask({"type": "health"})["state"] == "idle", "the story to end")
    broker.start()
    second = listen(broker, f"{RESPONSE}/#")
    until(lambda: daemon.log.read_text().count("mqtt connected") == 2, "the daemon to come back")
    second.publish(REQUEST, STORY | {"id": "a", "stream": True})  # perhaps it was published before we listened
    assert body(second.next(f"{RESPONSE}/a"))["status"] == "ok"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)], check=False)
    if mounted.returncode != 0:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small disk")
def test_mqtt_full_disk_refuses_what_is_new_and_serves_what_is_there(
    serve: Serve, listener: Listener, small_disk: Path
) -> None:
    daemon = serve(backend="fake:50", STATE=str(small_disk))
    listener.publish(REQUEST, {"id": "before", "prompt": "Once", "max_tokens": 1})
    before = listener.next(f"{RESPONSE}/before")
    listener.publish(REQUEST, STORY | {"id": "running", "stream": True})
    listener.next("edgelm/dev/stream/running")
    filler = small_disk / "filler"
    free = os.statvfs(small_disk)
    filler.write_bytes(bytes(free.f_bavail * free.f_frsize - 256 * 1024))

    listener.publish(REQUEST, {"id": "new", "prompt": "Once"})
    refused = body(listener.next(f"{RESPONSE}/new"))
    assert refused["error"]["code"] == "storage_full" and refused["error"]["retry_after_ms"] > 0
    assert body(listener.next(f"{RESPONSE}/running"))["status"] == "ok"
    listener.publish(REQUEST, {"id": "before", "prompt": "Once", "max_tokens": 1})
    assert listener.next(f"{RESPONSE}/before").payload == before.payload
    assert daemon.line().ask({"prompt": "Once", "max_tokens": 1})["status"] == "ok"

    filler.unlink()
    listener.publish(REQUEST, {"id": "new", "prompt": "Once"})
    assert body(listener.next(f"{RESPONSE}/new"))["status"] == "ok"


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount a small disk")
def test_mqtt_answer_that_finds_no_room_waits_for_it(serve: Serve, listener: Listener, small_disk: Path) -> None:
    daemon = serve(backend="fake:50", STATE=str(small_disk))
    listener.publish(REQUEST, STORY | {"id": "running", "stream": True})
    listener.next("edgelm/dev/stream/running")
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    until(lambda: "wait to be stored" in daemon.log.read_text(), "the answer to find no room")
    filler.unlink()
    assert body(listener.next(f"{RESPONSE}/running"))["status"] == "ok"
