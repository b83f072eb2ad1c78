"""`edgelm fleet` on a real broker with real daemons, and with strangers who publish what they like."""

import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest

from edge.fleet.table import table
from edge.transports.mqtt.fleet import MAX_DEVICES, Device, Fleet, FleetView
from tests.integration.harness import ROOT, TIMEOUT_S, Broker, Daemon, Listener, clean_environment, run_module, until
from tests.support.certificates import make_authority, make_certificate


@pytest.fixture
def start(tmp_path: Path, debug_bundle: Path) -> Iterator[Callable[..., Daemon]]:
    """Start daemons by name, each in a folder of its own."""
    daemons: list[Daemon] = []

    def begin(name: str, broker: Broker, **settings: Any) -> Daemon:
        (tmp_path / name).mkdir()
        arguments = ["--backend", "fake", "--mqtt", broker.address]
        daemons.append(Daemon(tmp_path / name, debug_bundle, *arguments, DEVICE=name, **settings))
        return daemons[-1]

    yield begin
    for daemon in daemons:
        daemon.close()


def fleet(broker: Broker, *more: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return run_module("edge.fleet", "--mqtt", broker.address, *more, **settings)


def devices(broker: Broker, **settings: Any) -> dict[str, dict[str, Any]]:
    """What --json tells, by device."""
    done = fleet(broker, "--json", **settings)
    assert done.returncode == 0, done.stderr
    return {device["device"]: device for device in json.loads(done.stdout)["devices"]}


@pytest.mark.slow
def test_fleet_tells_of_every_device_and_of_those_that_are_gone(
    broker: Broker, start: Callable[..., Daemon], listen: Callable[..., Listener]
) -> None:
    listener = listen(broker, "edgelm/+/metrics")
    started = {name: start(name, broker) for name in ("kitchen", "shed", "attic")}
    for _ in started:
        listener.heard.get(timeout=TIMEOUT_S)
    found = devices(broker)
    assert sorted(found) == ["attic", "kitchen", "shed"]
    for device in found.values():
        assert (device["state"], device["backend"], device["queued"]) == ("idle", "fake", 0)
        assert device["bundle"].startswith("debug@") and device["tokens_per_s"] == 0 and device["version"]
        assert device["seen_s_ago"] < 60, "kept by the broker, with its time"

    started["shed"].signal(signal.SIGKILL)
    started["attic"].signal(signal.SIGTERM)
    listener = listen(broker, "edgelm/+/availability")
    while not {"shed", "attic"} <= {d for d, of in devices(broker).items() if of["state"] in ("vanished", "stopped")}:
        time.sleep(0.2)  # bounded by the timeout of the test
    found = devices(broker)
    assert {name: device["state"] for name, device in found.items()} == {
        "kitchen": "idle",
        "shed": "vanished",
        "attic": "stopped",
    }
    assert found["shed"]["bundle"] == found["kitchen"]["bundle"], "what it ran last"

    done = fleet(broker)
    head, *rows = done.stdout.splitlines()
    assert head.split("  ")[0] == "DEVICE" and head.endswith("LAST SEEN")
    assert [row.split()[:2] for row in rows] == [["attic", "stopped"], ["kitchen", "idle"], ["shed", "vanished"]]
    assert all(row.endswith(" ago") for row in rows)


@pytest.mark.slow
def test_fleet_is_below_the_base_topic(broker: Broker, start: Callable[..., Daemon]) -> None:
    start("kitchen", broker, MQTT_BASE_TOPIC="home/stories")
    until(lambda: list(devices(broker, MQTT_BASE_TOPIC="home/stories")) == ["kitchen"], "the device")
    assert devices(broker) == {}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_fleet_logs_in_as_the_settings_say(make_broker: Callable[..., Broker], tmp_path: Path) -> None:
    make_authority(tmp_path, "ca")
    make_certificate(tmp_path, "broker", "localhost", authority="ca", names="IP:127.0.0.1")
    (tmp_path / "passwords").write_text("monitor:word\n")
    subprocess.run(["mosquitto_passwd", "-U", str(tmp_path / "passwords")], check=True)
    files = {"cafile": "ca.pem", "certfile": "broker.pem", "keyfile": "broker.key", "password_file": "passwords"}
    lines = [f"{key} {tmp_path / file}" for key, file in files.items()]
    broker = make_broker(*lines, "allow_anonymous false").start()
    settings = tmp_path / "edgelm.toml"
    login = 'username = "monitor"\npassword_file = "word"\nca_file = "ca.pem"\n'
    settings.write_text(f'[mqtt]\nhost = "127.0.0.1"\nport = {broker.port}\n{login}')
    (tmp_path / "word").write_text("word\n")
    done = run_module("edge.fleet", "--config", str(settings), "--json")
    assert done.returncode == 0, done.stderr
    expected = {"broker": broker.address, "connected": True, "left_out": False, "devices": []}
    assert json.loads(done.stdout) == expected
    (tmp_path / "word").write_text("wrong\n")
    done = run_module("edge.fleet", "--config", str(settings), "--json")
    assert done.returncode == 69 and "refuses the login of user 'monitor'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_fleet_without_a_broker_says_so(broker: Broker) -> None:
    done = run_module("edge.fleet")
    assert done.returncode == 78 and "no broker is set: name one by --mqtt HOST" in done.stderr
    broker.stop()
    done = fleet(broker)
    assert done.returncode == 69 and f"the broker {broker.address} cannot be reached" in done.stderr


@pytest.mark.slow
def test_fleet_lives_on_a_terminal(broker: Broker, start: Callable[..., Daemon]) -> None:
    """Rows come, change, and survive a restart of the broker; Ctrl-C ends it."""
    daemon = start("kitchen", broker)
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 120, 0, 0))
    command = [sys.executable, "-m", "edge.fleet", "--mqtt", broker.address]
    environment = clean_environment() | {"TERM": "xterm"}
    program = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=follower, stderr=follower)
    os.close(follower)
    os.set_blocking(leader, False)
    screen = pyte.Screen(120, 12)
    stream = pyte.ByteStream(screen)

    def shows(*words: str) -> bool:
        try:
            stream.feed(os.read(leader, 65536))
        except BlockingIOError:
            time.sleep(0.05)
        return all(word in "\n".join(screen.display) for word in words)

    try:
        until(lambda: shows("kitchen  idle", f"1 of 1 devices of {broker.address} are there"), "the device")
        broker.stop()
        until(lambda: shows("the broker is lost, trying again"), "its loss")
        broker.start()
        until(lambda: shows("kitchen  idle", "are there") and not shows("is lost"), "its return")
        daemon.signal(signal.SIGKILL)
        until(lambda: shows("kitchen  vanished", "0 of 1 devices"), "the end of the device")
        program.send_signal(signal.SIGINT)
        assert program.wait(TIMEOUT_S) == 130
        until(lambda: not shows("kitchen"), "a clean terminal")
        assert not screen.cursor.hidden
    finally:
        program.kill()
        program.wait()
        os.close(leader)


STATE = {"type": "health", "state": "idle", "queued": 0, "model": "m@1", "backend": "ort", "version": "0.1.0"}


def heard(*messages: tuple[str, object]) -> list[Device]:
    """What becomes of messages on topics below the base."""
    known = Fleet("edgelm")
    for topic, content in messages:
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        known.hear(f"edgelm/{topic}", payload, retained=False)
    return known.devices()


@pytest.mark.parametrize(
    ("topic", "content"),
    [
        ("-oProxyCommand=x/state", STATE),
        ("a b/state", STATE),
        (f"{'x' * 65}/state", STATE),
        ("a/info", STATE),
        ("a/b/state", STATE),
        ("a/state", b"{"),
        ("a/state", b"\xff" * 10),
        ("a/state", b"[" * 60_000),
        ("a/state", b" " * 70_000),
        ("a/state", STATE | {"type": "response"}),
        ("a/state", STATE | {"model": "x" * 200}),
        ("a/state", STATE | {"queued": -1}),
        ("a/metrics", {"type": "metrics", "tokens_per_s": 1e300}),
        ("a/metrics", {"type": "metrics", "tokens_per_s": 1, "watts": {"x" * 200: 1.0}}),
    ],
)
def test_fleet_passes_over_what_no_device_would_send(topic: str, content: object) -> None:
    assert heard((topic, content)) == []


def test_fleet_takes_messages_of_other_releases() -> None:
    newer = STATE | {"mood": "good", "state": "dreaming"}
    (device,) = heard(("a/state", newer), ("a/metrics", {"type": "metrics", "tokens_per_s": 2.5}))
    assert (device.state, device.tokens_per_s, device.watts) == ("unknown", 2.5, None)
    assert device.seen_s_ago is not None and device.seen_s_ago < 60


def test_fleet_watts_are_those_of_the_board() -> None:
    """A Jetson's rails are parts of its input."""
    rails = {"VDD_IN": 7.5, "VDD_CPU_GPU_CV": 3.0, "VDD_SOC": 1.5}
    (device,) = heard(("a/metrics", {"type": "metrics", "tokens_per_s": 0, "watts": rails}))
    assert device.watts == 7.5


def test_fleet_forgets_what_is_cleared_and_keeps_a_bounded_number() -> None:
    assert heard(("a/state", STATE), ("a/availability", b"")) == []
    known = Fleet("edgelm")
    for number in range(MAX_DEVICES + 5):
        known.hear(f"edgelm/d{number}/state", json.dumps(STATE).encode(), retained=True)
    assert len(known.devices()) == MAX_DEVICES and known.left_out


def test_fleet_table_cannot_steer_a_terminal() -> None:
    nasty = Device(device="a", state="degraded", bundle="\x1b[2J" + "x" * 100, failure="no\x1b]0;GPU")
    lines = table(FleetView(broker="b", connected=True, left_out=True, devices=[nasty]))
    assert not any(character in "\n".join(lines) for character in "\x1b\x07") and len(lines) == 4
    assert lines[2].startswith("a: no") and max(map(len, lines)) < 140
