"""What a daemon is like after much work, too much work, and nonsense."""

import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import fuzz_mqtt, fuzz_socket
from tests.integration.harness import Broker, Daemon, Line, until
from tests.soak import Resources, grown, resources, run

StartDaemon = Callable[..., Daemon]
needs_mosquitto = pytest.mark.skipif(
    shutil.which("mosquitto_pub") is None and "CI" not in os.environ, reason="mosquitto is not installed"
)


@needs_mosquitto
def test_memory_and_descriptors_stay_as_they_are(debug_bundle: Path) -> None:
    before, after = run(1000, "fake", debug_bundle, print)
    assert grown(before, after) is None


def test_a_leak_would_be_seen() -> None:
    assert "kB" in (grown(Resources(50_000, 9), Resources(51_001, 9)) or "")
    assert "descriptors" in (grown(Resources(50_000, 9), Resources(50_000, 11)) or "")


def test_no_line_ends_the_daemon_or_goes_without_its_reply(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    counts = fuzz_socket(daemon, 2000, random.Random(1))
    print(counts)
    assert counts["bad_request"] > 1000 and counts["ok"] > 10
    assert daemon.line().ask({"prompt": "x", "max_tokens": 1})["status"] == "ok"
    assert "Traceback" not in daemon.log.read_text()


@needs_mosquitto
def test_nor_does_a_message_over_mqtt(start_daemon: StartDaemon, broker: Broker) -> None:
    daemon = start_daemon("--mqtt", broker.address, DEVICE="dev")
    until(lambda: "mqtt connected" in daemon.log.read_text(), "the connection")
    counts = fuzz_mqtt(broker, 200, random.Random(1))
    print(counts)
    assert counts["bad_request"] > 100 and counts["ok"] > 5
    assert "Traceback" not in daemon.log.read_text()


def test_overload_is_refused_with_advice_and_passes(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(backend="fake:5")
    codes: list[str] = []

    def client() -> None:
        line = Line(daemon.socket)
        line.send(*({"prompt": "Once", "steps": 8, "id": str(i)} for i in range(40)))
        for _ in range(40):
            reply = line.read() or {}
            codes.append(reply["error"]["code"] if reply["error"] else "ok")
            assert codes[-1] != "queue_full" or reply["error"]["retry_after_ms"] >= 1
        line.close()

    clients = [threading.Thread(target=client) for _ in range(10)]
    before = resources(daemon.process.pid)
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert len(codes) == 400 and set(codes) == {"ok", "queue_full"} and codes.count("ok") >= 33
    assert resources(daemon.process.pid).resident_kb <= before.resident_kb + 8 * 1024
    assert daemon.line().ask({"prompt": "x", "max_tokens": 1})["status"] == "ok"
