"""What a daemon is like after much work, too much work, and nonsense."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.harness import Broker, Daemon, until
from tests.stress import overload
from tests.stress.fuzz import fuzz_mqtt, fuzz_socket
from tests.stress.soak import Resources, grown, run

StartDaemon = Callable[..., Daemon]
needs_mosquitto = pytest.mark.skipif(
    shutil.which("mosquitto_pub") is None and "CI" not in os.environ, reason="mosquitto is not installed"
)


@pytest.mark.slow
@needs_mosquitto
def test_endurance_memory_and_descriptors_stay_constant(debug_bundle: Path) -> None:
    before, after = run(1000, "fake", debug_bundle, print)
    assert grown(before, after) is None


def test_endurance_leak_would_be_reported() -> None:
    assert "kB" in (grown(Resources(50_000, 9), Resources(51_001, 9)) or "")
    assert "descriptors" in (grown(Resources(50_000, 9), Resources(50_000, 11)) or "")


@pytest.mark.slow
def test_endurance_every_socket_line_gets_its_reply(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    counts = fuzz_socket(daemon, 2000, random.Random(1))
    print(counts)
    assert counts["bad_request"] > 1000 and counts["ok"] > 10
    assert daemon.line().ask({"prompt": "x", "max_tokens": 1})["status"] == "ok"
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.slow
@needs_mosquitto
def test_endurance_every_mqtt_message_gets_its_reply(start_daemon: StartDaemon, broker: Broker) -> None:
    daemon = start_daemon("--mqtt", broker.address, DEVICE="dev")
    until(lambda: "mqtt connected" in daemon.log.read_text(), "the connection")
    counts = fuzz_mqtt(broker, 200, random.Random(1))
    print(counts)
    assert counts["bad_request"] > 100 and counts["ok"] > 5
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.slow
@needs_mosquitto
def test_endurance_overload_is_refused_with_a_retry_time(debug_bundle: Path) -> None:
    report = overload.run(5, "fake:20", debug_bundle)
    print(report)
    assert report.fault is None
    assert report.answers["queue_full"] > report.answers["ok"] > 20
