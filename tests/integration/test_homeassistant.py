"""Discovery by Home Assistant through a real broker: announced, again at its birth, asked, and removed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import Broker, Daemon, Listener, run_module, until

CONFIG = "homeassistant/device/edgelm_dev/config"


@pytest.fixture
def announced(start_daemon: Callable[..., Daemon], broker: Broker) -> Callable[..., Daemon]:
    """Starts the daemon with discovery."""

    def start(**settings: str) -> Daemon:
        given = {"DEVICE": "dev", "HOMEASSISTANT_DISCOVERY": "true"} | settings
        return start_daemon("--mqtt", broker.address, **given)

    return start


def body(listener: Listener, topic: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(listener.next(topic).payload)
    return found


def test_homeassistant_is_told_before_the_state(
    announced: Callable[..., Daemon], broker: Broker, listen: Callable[..., Listener]
) -> None:
    listener = listen(broker, "#")
    announced()
    topics = [listener.heard.get(timeout=20).topic for _ in range(5)]
    assert topics.index(CONFIG) < topics.index("edgelm/dev/state")
    assert listen(broker, "homeassistant/#").heard.get(timeout=20).retain


def test_homeassistant_is_told_again_when_it_starts(
    announced: Callable[..., Daemon], broker: Broker, listen: Callable[..., Listener]
) -> None:
    """With the counters, which are not retained."""
    listener = listen(broker, "#")
    announced()
    first = body(listener, CONFIG)
    body(listener, "edgelm/dev/metrics")
    listener.publish("homeassistant/status", b"offline")
    listener.publish("homeassistant/status", b"online")
    assert body(listener, CONFIG) == first
    assert body(listener, "edgelm/dev/metrics")["type"] == "metrics"


def test_homeassistant_prompt_is_answered_where_its_event_listens(
    announced: Callable[..., Daemon], broker: Broker, listen: Callable[..., Listener]
) -> None:
    listener = listen(broker, "#")
    announced()
    components = body(listener, CONFIG)["components"]
    until(lambda: "online" in broker.tool("mosquitto_sub", "-t", "edgelm/dev/availability", "-C", "1"), "the daemon")
    listener.publish(components["prompt"]["command_topic"], {"prompt": "Once"})
    assert body(listener, components["story"]["state_topic"])["status"] == "ok"


@pytest.mark.slow
def test_homeassistant_is_told_of_the_end_of_the_option(
    announced: Callable[..., Daemon], broker: Broker, listen: Callable[..., Listener], tmp_path: Path
) -> None:
    daemon = announced()
    until(lambda: (tmp_path / "homeassistant").exists(), "the announcement")
    listener = listen(broker, "homeassistant/#")
    assert listener.next(CONFIG).payload
    daemon.close()
    off = announced(HOMEASSISTANT_DISCOVERY="false")
    assert listener.next(CONFIG).payload == b""
    until(lambda: not (tmp_path / "homeassistant").exists(), "the end of what is remembered")
    off.close()


def test_homeassistant_birth_means_nothing_while_the_option_is_off(
    announced: Callable[..., Daemon], broker: Broker, listen: Callable[..., Listener]
) -> None:
    listener = listen(broker, "#")
    announced(HOMEASSISTANT_DISCOVERY="false")
    listener.next("edgelm/dev/metrics")
    listener.publish("homeassistant/status", b"online")
    listener.publish("edgelm/dev/request/health", b"", ResponseTopic="edgelm/reply/me")
    heard: list[str] = []
    while not heard or heard[-1] != "edgelm/reply/me":
        heard.append(listener.heard.get(timeout=20).topic)
    assert CONFIG not in heard and "edgelm/dev/metrics" not in heard


def test_homeassistant_without_a_broker_is_refused(debug_bundle: Path, tmp_path: Path) -> None:
    paths = {"SOCKET": str(tmp_path / "s"), "STATE": str(tmp_path)}
    program = ["--bundle", str(debug_bundle), "--backend", "fake"]
    done = run_module("edge", *program, temporary=None, HOMEASSISTANT_DISCOVERY="true", **paths)
    assert done.returncode == 78 and "homeassistant.discovery needs mqtt.host" in done.stderr
