"""An answer reaches a broker that refuses it, hangs up on it, changes its version or is left for another daemon."""

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import MQTTMessage

from tests.integration.harness import TIMEOUT_S, Broker, Daemon, Listener, until

REQUEST = "edgelm/dev/request/generate"
RESPONSE = "edgelm/dev/response"
ALICE = "edgelm/reply/alice"
Serve = Callable[..., Daemon]
Listen = Callable[..., Listener]


@pytest.fixture
def serve(start_daemon: Callable[..., Daemon]) -> Serve:
    """Start a daemon named `dev` on a broker, and wait until it is connected."""
    started = 0

    def start(address: str, backend: str = "fake", **settings: str) -> Daemon:
        nonlocal started
        started += 1
        daemon = start_daemon("--mqtt", address, backend=backend, **({"DEVICE": "dev"} | settings))
        until(lambda: daemon.log.read_text().count("mqtt connected") >= started, "the daemon to connect")
        return daemon

    return start


def body(message: MQTTMessage) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(message.payload)
    return decoded


class Guarded:
    """A broker with a list of who may do what, which it reads again when told to."""

    def __init__(self, make_broker: Callable[..., Broker], folder: Path) -> None:
        self._acl = folder / "acl"
        self.allow("topic readwrite #")
        self.broker = make_broker(f"acl_file {self._acl}").start()

    def allow(self, *lines: str) -> None:
        self._acl.write_text("\n".join(lines) + "\n")
        self._acl.chmod(0o644)

    def reload(self) -> None:
        assert self.broker._process is not None
        self.broker._process.send_signal(signal.SIGHUP)
        time.sleep(0.5)  # nothing says when it is done


@pytest.mark.slow
def test_mqtt_answer_that_the_broker_refused_for_a_while_comes(
    serve: Serve, make_broker: Callable[..., Broker], listen: Listen, tmp_path: Path
) -> None:
    guarded = Guarded(make_broker, tmp_path)
    daemon = serve(guarded.broker.address)
    listener = listen(guarded.broker, ALICE)
    guarded.allow(
        *[f"topic readwrite edgelm/dev/{kind}/#" for kind in ("request", "response", "state")], "topic read #"
    )
    guarded.reload()
    listener.publish(REQUEST, {"id": "a", "prompt": "Once"}, ResponseTopic=ALICE)
    until(lambda: "refuses the answer" in daemon.log.read_text(), "the refusal")
    guarded.allow("topic readwrite #")
    guarded.reload()
    assert body(listener.next(ALICE))["status"] == "ok"


@pytest.mark.slow
def test_mqtt_answer_that_the_broker_refused_before_a_restart_comes_after_it(
    serve: Serve, make_broker: Callable[..., Broker], listen: Listen, tmp_path: Path
) -> None:
    guarded = Guarded(make_broker, tmp_path)
    daemon = serve(guarded.broker.address)
    listener = listen(guarded.broker, ALICE)
    guarded.allow(
        *[f"topic readwrite edgelm/dev/{kind}/#" for kind in ("request", "response", "state")], "topic read #"
    )
    guarded.reload()
    listener.publish(REQUEST, {"id": "a", "prompt": "Once"}, ResponseTopic=ALICE)
    until(lambda: "refuses the answer" in daemon.log.read_text(), "the refusal")
    daemon.signal(signal.SIGKILL)
    daemon.exit_code()
    guarded.allow("topic readwrite #")
    guarded.reload()
    serve(guarded.broker.address)
    assert body(listener.next(ALICE))["status"] == "ok"


class HangsUp:
    """Stands before a broker and speaks 3.1.1 only; hangs up on a client that publishes to a topic, as a broker does
    whose limits nobody is told of.
    """

    def __init__(self, port: int, topic: bytes) -> None:
        self._port, self._topic = port, topic
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.hung_up = 0
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                first = client.recv(4096)
                if first[first.index(b"MQTT") + 4] == 5:
                    client.sendall(b"\x20\x02\x00\x01")
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._port))
                server.sendall(first)
                for source, sink, guarded in ((client, server, True), (server, client, False)):
                    self._threads.append(
                        threading.Thread(target=self._hand_on, args=(source, sink, guarded), daemon=True)
                    )
                    self._threads[-1].start()

    def _hand_on(self, source: socket.socket, sink: socket.socket, guarded: bool) -> None:
        with source, suppress(OSError):
            while data := source.recv(4096):
                if guarded and self._topic in data:
                    self.hung_up += 1
                    break
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(TIMEOUT_S)


@pytest.mark.slow
def test_mqtt_answer_that_ends_connections_keeps_no_other_from_arriving(
    serve: Serve, broker: Broker, listen: Listen
) -> None:
    proxy = HangsUp(broker.port, b"edgelm/reply/poison")
    daemon = serve(proxy.address)
    listener = listen(broker, "edgelm/dev/response/#")
    request = {"prompt": "Once", "max_tokens": 1}
    listener.publish(REQUEST, request | {"id": "p", "response_topic": "edgelm/reply/poison"})
    until(lambda: proxy.hung_up > 0, "the broker to hang up")
    for i in range(5):
        listener.publish(REQUEST, request | {"id": str(i)})
    answered = {listener.heard.get(timeout=TIMEOUT_S).topic for _ in range(5)}
    assert answered == {f"{RESPONSE}/{i}" for i in range(5)}
    tries = proxy.hung_up
    time.sleep(1.0)
    assert proxy.hung_up <= tries + 1  # later and later
    daemon.close()
    proxy.close()


def test_mqtt_answers_survive_a_broker_that_falls_back_to_the_old_version(
    serve: Serve, broker: Broker, listen: Listen
) -> None:
    """The first answers go to a broker of the new version, and come from it no further; then it speaks the old one."""
    daemon = serve(broker.address, backend="fake:20")
    listener = listen(broker, f"{RESPONSE}/#")
    for i in range(5):
        listener.publish(REQUEST, {"id": str(i), "prompt": "Once", "steps": 5})
    daemon.signal(signal.SIGKILL)
    daemon.exit_code()
    proxy = HangsUp(broker.port, b"nothing of that kind")
    second = serve(proxy.address)
    answered: set[str] = set()
    while len(answered) < 5:
        answered.add(listener.heard.get(timeout=TIMEOUT_S).topic)
    second.close()
    proxy.close()


@pytest.mark.slow
def test_mqtt_drain_leaves_requests_to_the_next_daemon(serve: Serve, broker: Broker, listen: Listen) -> None:
    daemon = serve(broker.address, backend="fake:100", DRAIN_S="20")
    listener = listen(broker)
    listener.publish(REQUEST, {"id": "running", "prompt": "Once", "steps": 20, "stream": True})
    listener.next("edgelm/dev/stream/running")
    daemon.signal(signal.SIGTERM)
    while body(listener.next("edgelm/dev/state"))["state"] != "draining":
        pass
    listener.publish(REQUEST, {"id": "late", "prompt": "Once"})
    assert daemon.exit_code() == 0
    serve(broker.address)
    answer = body(listener.next(f"{RESPONSE}/late"))
    assert answer["status"] == "ok", answer


@pytest.mark.slow
def test_mqtt_two_daemons_of_one_name_say_so_and_do_not_fight(
    start_daemon: Callable[..., Daemon], broker: Broker, tmp_path: Path, debug_bundle: Path
) -> None:
    first = start_daemon("--mqtt", broker.address, DEVICE="dev")
    until(lambda: "mqtt connected" in first.log.read_text(), "the first to connect")
    (tmp_path / "other").mkdir()
    second = Daemon(tmp_path / "other", debug_bundle, "--backend", "fake", "--mqtt", broker.address, DEVICE="dev")

    def logs() -> str:
        return first.log.read_text() + second.log.read_text()

    try:
        until(lambda: "another client also logs in" in logs(), "one of them to say why it is off")
        assert "as edgelm-dev" in logs() and "`device`" in logs() and "trying again in 60 s" in logs()
        time.sleep(2.0)
        logins = logs().count("mqtt connected")
        time.sleep(5.0)
        assert logs().count("mqtt connected") == logins <= 8  # the other one stays
        assert "Unspecified" not in logs()
    finally:
        second.close()


def test_mqtt_password_in_plain_text_beyond_loopback_is_warned_of(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("secret\n")
    settings = {"MQTT_USERNAME": "dev", "MQTT_PASSWORD_FILE": str(tmp_path / "password")}
    for host, warned in (("127.0.0.1", 0), ("localhost", 0), ("broker.invalid", 1)):
        daemon = start_daemon("--mqtt", host, **settings)
        until(lambda d=daemon: "cannot be reached" in d.log.read_text(), "the attempt")  # type: ignore[misc]
        assert daemon.log.read_text().count("unencrypted: set mqtt.ca_file") == warned
        daemon.close()
        daemon.log.unlink()


def test_mqtt_example_that_a_daemon_prints_works_as_pasted(start_daemon: Callable[..., Daemon], broker: Broker) -> None:
    daemon = start_daemon("--mqtt", broker.address)
    until(lambda: "mqtt connected" in daemon.log.read_text(), "the connection")
    assert daemon.process.stdout is not None
    line = daemon.process.stdout.readline()
    command = line.removeprefix("ask it over MQTT: ")
    assert command != line
    answer = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
    assert json.loads(answer)["status"] == "ok"
