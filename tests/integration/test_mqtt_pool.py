"""Devices that share the requests of a pool: each id has one answer, whichever of them the broker asks, and dies."""

import json
import queue
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.transports.mqtt.properties import sent_with
from tests.integration.harness import TIMEOUT_S, Broker, Daemon, Listener, until
from tests.stress.chaos_report import read_journal
from tests.stress.pool import run

BASE = "edgelm/pool/kitchen"
REQUEST = f"{BASE}/request/generate"
STORY = {"prompt": "Once upon a time", "max_tokens": 8}
Member = Callable[..., Daemon]


@pytest.fixture
def member(tmp_path: Path, debug_bundle: Path, broker: Broker) -> Iterator[Member]:
    """Start a device of the pool, or start it again; it is connected then."""
    daemons: list[Daemon] = []

    def start(name: str, backend: str = "fake", pool: str = "kitchen") -> Daemon:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        before = (folder / "log").read_text().count("mqtt connected") if (folder / "log").exists() else 0
        flags = ("--backend", backend, "--mqtt", broker.address)
        daemon = Daemon(folder, debug_bundle, *flags, DEVICE=name, MQTT_POOL=pool)
        daemons.append(daemon)
        until(lambda: daemon.log.read_text().count("mqtt connected") > before, "the connection")
        return daemon

    yield start
    for daemon in daemons:
        daemon.close()


@pytest.fixture
def listener(broker: Broker, listen: Callable[..., Listener]) -> Listener:
    return listen(broker)


def answers(listener: Listener, count: int, below: str = f"{BASE}/response") -> list[dict[str, Any]]:
    """The next answers below a topic."""
    found: list[dict[str, Any]] = []
    while len(found) < count:
        message = listener.heard.get(timeout=TIMEOUT_S)
        if message.topic.startswith(below):
            found.append(json.loads(message.payload))
    return found


def quiet(listener: Listener, below: str, seconds: float = 1.0) -> bool:
    """Whether nothing comes below a topic for a while."""
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        try:
            if listener.heard.get(timeout=left_s).topic.startswith(below):
                return False
        except queue.Empty:
            return True
    return True


def held(folder: Path) -> set[str | None]:
    """Ids that the journal of a stopped device holds."""
    return {kept.id for kept in read_journal(folder / "journal.sqlite").kept.values()}


@pytest.mark.slow
def test_mqtt_pool_gives_each_request_to_one_device(member: Member, listener: Listener, tmp_path: Path) -> None:
    daemons = [member("a"), member("b")]
    for i in range(6):
        listener.publish(REQUEST, STORY | {"id": str(i)})
        listener.publish(f"{REQUEST}/anna", STORY | {"id": str(i)}, CorrelationData=b"x")
    own = answers(listener, 12)
    assert all(answer["status"] == "ok" for answer in own) and quiet(listener, f"{BASE}/response")
    for daemon in daemons:
        daemon.close()
    assert held(tmp_path / "a") and held(tmp_path / "b")
    listener.publish(REQUEST, b"Once")
    member("a")
    member("b")
    assert answers(listener, 1)[0]["id"] is None  # the broker kept it


def test_mqtt_pool_answers_an_id_with_one_text_whoever_is_asked(
    member: Member, listener: Listener, tmp_path: Path
) -> None:
    daemons = [member("a", backend="fake:20"), member("b", backend="fake:20")]
    for _ in range(4):  # the broker asks the devices in turn
        listener.publish(REQUEST, STORY | {"id": "1"}, ResponseTopic="edgelm/reply/me", CorrelationData=b"first")
    first = json.loads(listener.next("edgelm/reply/me").payload)
    for _ in range(2):
        listener.publish(REQUEST, STORY | {"id": "1"}, ResponseTopic="edgelm/reply/me", CorrelationData=b"again")
        message = listener.next("edgelm/reply/me")
        assert json.loads(message.payload) == first
    assert sent_with(message, "CorrelationData") == b"again"
    for daemon in daemons:
        daemon.close()
    assert sorted([held(tmp_path / "a"), held(tmp_path / "b")], key=len) == [set(), {"1"}]


def test_mqtt_pool_refuses_an_id_that_another_device_knows_for_another_request(
    member: Member, listener: Listener
) -> None:
    member("a")
    member("b")
    listener.publish(REQUEST, STORY | {"id": "1"})
    assert answers(listener, 1)[0]["status"] == "ok"
    for _ in range(2):
        listener.publish(REQUEST, {"id": "1", "prompt": "another"})
        assert answers(listener, 1)[0]["error"]["code"] == "conflict"


@pytest.mark.slow
def test_mqtt_pool_waits_for_the_device_that_has_it_and_writes_nothing_twice(
    member: Member, listener: Listener
) -> None:
    """Its owner dies, and its client asks the others again: they know whose it is. On its return it answers."""
    daemons = {name: member(name, backend="fake:100") for name in ("a", "b")}
    listener.publish(REQUEST, STORY | {"id": "1", "stream": True})
    topic = ""
    while "/stream/" not in topic:
        topic = listener.heard.get(timeout=TIMEOUT_S).topic
    owner = topic.split("/")[1]
    daemons[owner].signal(signal.SIGKILL)
    daemons[owner].exit_code()
    for _ in range(2):  # one waits for the dead one, one reaches the other
        listener.publish(REQUEST, STORY | {"id": "1", "stream": True})
    assert quiet(listener, f"{BASE}/response", seconds=2.0)
    member(owner)
    assert answers(listener, 1)[0]["status"] == "ok"


def test_mqtt_pool_cancel_reaches_the_device_that_has_it(member: Member, listener: Listener) -> None:
    member("a", backend="fake:100")
    member("b", backend="fake:100")
    for i in range(2):
        listener.publish(f"{REQUEST}/anna", {"prompt": "x", "id": str(i), "stream": True})
    until(lambda: listener.heard.get(timeout=TIMEOUT_S).topic.endswith("/stream/anna/1"), "a snapshot")
    for i in range(2):
        listener.publish(f"{BASE}/request/cancel/anna", {"id": str(i)})
    assert {answer["status"] for answer in answers(listener, 2)} == {"cancelled"}


def test_mqtt_pool_refuses_as_a_device_does(member: Member, listener: Listener) -> None:
    member("a")
    for payload, code in (
        (b"", "bad_request"),
        (b"{", "bad_request"),
        (b"\xff", "bad_request"),
        (b'{"promt": "x"}', "bad_request"),
        (b'{"prompt": "x", "response_topic": "edgelm/pool/kitchen/claim"}', "bad_reply_topic"),
        (b'{"prompt": "x", "response_topic": "edgelm/pool/kitchen/request/generate"}', "bad_reply_topic"),
        (b'{"prompt": "x", "images": ["attachment:card"]}', "bad_request"),
        (b'{"prompt": "' + b"x" * 65536 + b'"}', "too_large"),
    ):
        listener.publish(REQUEST, payload)
        assert answers(listener, 1)[0]["error"]["code"] == code


def test_mqtt_pool_claims_that_are_none_change_nothing(member: Member, listener: Listener) -> None:
    daemon = member("a")
    claim = {"type": "claim", "device": "x", "key": "0" * 32, "payload_sha256": "0" * 64}
    bad: list[Any] = [
        b"",
        b"{",
        b"\xff",
        b"[" * 9999,
        {},
        claim | {"key": "0"},
        claim | {"device": "a/b"},
        claim | {"more": 1},
    ]
    for payload in bad:
        listener.publish(f"{BASE}/claim", payload)
    listener.publish(f"{BASE}/claim", claim, CorrelationData=b"x" * 9999)
    listener.publish(f"{BASE}/claim/more", claim)
    listener.publish(REQUEST, STORY | {"id": "1"})
    assert answers(listener, 1)[0]["status"] == "ok" and "Traceback" not in daemon.log.read_text()


def test_mqtt_pool_device_that_has_left_answers_what_it_is_given_and_no_more(
    member: Member, listener: Listener, tmp_path: Path
) -> None:
    member("a").close()
    left = member("a", pool="")
    listener.publish(REQUEST, STORY | {"id": "1"})
    assert answers(listener, 1)[0]["id"] == "1"
    member("b")
    for i in range(4):
        listener.publish(REQUEST, STORY | {"id": f"more{i}"})
    assert len(answers(listener, 4)) == 4
    left.close()
    assert held(tmp_path / "a") == {"1"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mqtt_pool_loses_nothing_when_its_devices_are_killed(debug_bundle: Path) -> None:
    report = run(80, debug_bundle, backend="fake:5", devices=3, seed=3, strikes=3, say=print)
    print(report)
    assert report.broken == 0 and sum(report.answers.values()) == 80
    assert report.answers["ok"] > 70  # a request alone on a device that is killed twice under it is answered `internal`
    assert report.killed >= 3 and len(report.answered) == 3
