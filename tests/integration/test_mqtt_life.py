"""Daemon and broker come and go: what others see of it, and what still works."""

import json
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from edge.config import MqttConfig
from edge.transports.mqtt.login import try_login
from tests.integration.harness import TIMEOUT_S, Broker, Daemon, Listener, until

REQUEST = "edgelm/dev/request/generate"
AVAILABILITY = "edgelm/dev/availability"
StartDaemon = Callable[..., Daemon]
MakeBroker = Callable[..., Broker]
Listen = Callable[..., Listener]


@pytest.fixture
def serve(broker: Broker, listen: Listen, start_daemon: StartDaemon) -> StartDaemon:
    """Start a daemon named `dev` on the broker, or what stands before it, and wait until it says it is online."""

    def start(backend: str = "fake", address: str | None = None, **settings: str) -> Daemon:
        watcher = listen(broker, AVAILABILITY)
        daemon = start_daemon("--mqtt", address or broker.address, backend=backend, DEVICE="dev", **settings)
        while watcher.next(AVAILABILITY).payload != b"online":
            pass
        return daemon

    return start


def test_mqtt_availability_is_retained_and_ends_with_the_daemon(
    serve: StartDaemon, broker: Broker, listen: Listen
) -> None:
    daemon = serve()
    watcher = listen(broker, AVAILABILITY)
    message = watcher.next(AVAILABILITY)
    assert message.payload == b"online" and message.retain

    daemon.signal(signal.SIGTERM)
    assert watcher.next(AVAILABILITY).payload == b"offline"
    assert daemon.exit_code() == 0
    assert listen(broker, AVAILABILITY).next(AVAILABILITY).payload == b"offline"


def test_mqtt_last_will_speaks_for_a_killed_daemon(serve: StartDaemon, broker: Broker, listen: Listen) -> None:
    daemon = serve()
    watcher = listen(broker, AVAILABILITY)
    assert watcher.next(AVAILABILITY).payload == b"online"

    daemon.signal(signal.SIGKILL)
    assert watcher.next(AVAILABILITY).payload == b"offline"


def test_mqtt_drain_publishes_the_last_answer_before_offline(
    serve: StartDaemon, broker: Broker, listen: Listen
) -> None:
    daemon = serve(backend="fake:20")
    listener = listen(broker)
    listener.publish(REQUEST, {"id": "s", "prompt": "Once", "stream": True, "steps": 30})
    listener.next("edgelm/dev/stream/s")
    daemon.signal(signal.SIGTERM)

    assert json.loads(listener.next("edgelm/dev/response/s").payload)["status"] == "ok"
    assert listener.next(AVAILABILITY).payload == b"offline"


@pytest.mark.slow
def test_mqtt_without_a_broker_the_socket_serves_and_the_daemon_keeps_trying(
    make_broker: MakeBroker, start_daemon: StartDaemon
) -> None:
    broker = make_broker()
    daemon = start_daemon("--mqtt", broker.address, DEVICE="dev")
    assert f"mqtt connecting to {broker.address}" in daemon.ready
    until(lambda: "cannot be reached" in daemon.log.read_text(), "the failure to be told")
    assert daemon.line().ask({"prompt": "Once"})["status"] == "ok"

    for _ in range(2):  # it comes, and comes again: online is said anew, for the broker forgot it
        broker.start()
        assert broker.tool("mosquitto_sub", "-t", AVAILABILITY, "-C", "1", "-W", "15") == "online\n"
        broker.stop()
    assert daemon.log.read_text().count("cannot be reached") == 1


def test_mqtt_daemon_stops_at_once_while_it_waits_for_a_broker(
    make_broker: MakeBroker, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon("--mqtt", make_broker().address)
    daemon.signal(signal.SIGTERM)
    assert daemon.exit_code() == 0


def test_mqtt_password_file_opens_a_guarded_broker(
    make_broker: MakeBroker, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    guards, secret = tmp_path / "passwords", tmp_path / "secret"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(guards), "me", "s3cret"], check=True, timeout=TIMEOUT_S)
    broker = make_broker("allow_anonymous false", f"password_file {guards}").start()

    refused = start_daemon("--mqtt", broker.address, DEVICE="dev")
    until(lambda: "refuses the connection: Not authorized" in refused.log.read_text(), "the refusal to be told")
    refused.signal(signal.SIGTERM)
    assert refused.exit_code() == 0

    secret.write_text("s3cret\n")
    start_daemon("--mqtt", broker.address, DEVICE="dev", MQTT_USERNAME="me", MQTT_PASSWORD_FILE=str(secret))
    login = ["-u", "me", "-P", "s3cret"]
    assert broker.tool("mosquitto_sub", *login, "-t", AVAILABILITY, "-C", "1", "-W", "15") == "online\n"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: apt-get install openssl")
def test_mqtt_ca_file_turns_tls_on(make_broker: MakeBroker, start_daemon: StartDaemon, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*request, *names, *files], check=True, capture_output=True, timeout=TIMEOUT_S)
    broker = make_broker(f"certfile {certificate}", f"keyfile {key}").start()

    start_daemon("--mqtt", broker.address, DEVICE="dev", MQTT_CA_FILE=str(certificate))
    trust = ["--cafile", str(certificate)]
    assert broker.tool("mosquitto_sub", *trust, "-t", AVAILABILITY, "-C", "1", "-W", "15") == "online\n"


class OldBroker:
    """Stands before a broker and knows no MQTT 5: refuses that version as old brokers do, hands on the rest."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.refused = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                first = client.recv(4096)
                if first[first.index(b"MQTT") + 4] == 5:
                    self.refused += 1
                    client.sendall(b"\x20\x02\x00\x01")
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._port))
                server.sendall(first)
                for source, sink in ((client, server), (server, client)):
                    self._threads.append(threading.Thread(target=self._hand_on, args=(source, sink)))
                    self._threads[-1].start()

    @staticmethod
    def _hand_on(source: socket.socket, sink: socket.socket) -> None:
        with source, suppress(OSError):
            while data := source.recv(4096):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(TIMEOUT_S)


def test_mqtt_old_broker_is_served_in_its_own_version(serve: StartDaemon, broker: Broker, listen: Listen) -> None:
    old = OldBroker(broker.port)
    daemon = serve(address=old.address)
    listener = listen(broker)
    listener.publish(REQUEST, {"id": "1", "prompt": "x"})
    assert json.loads(listener.next("edgelm/dev/response/1").payload)["status"] == "ok"
    daemon.signal(signal.SIGTERM)
    assert daemon.exit_code() == 0
    while listener.next(AVAILABILITY).payload != b"offline":
        pass
    assert old.refused == 1 and "refuses MQTT 5; using 3.1.1" in daemon.log.read_text()
    old.close()


def test_mqtt_old_broker_has_no_pool_and_serves_the_devices_own_topics(
    serve: StartDaemon, broker: Broker, listen: Listen
) -> None:
    old = OldBroker(broker.port)
    daemon = serve(address=old.address, MQTT_POOL="kitchen")
    listener = listen(broker)
    listener.publish(REQUEST, {"id": "1", "prompt": "x"})
    assert json.loads(listener.next("edgelm/dev/response/1").payload)["status"] == "ok"
    sentence = "speaks MQTT 3.1.1 alone, which lacks shared subscriptions: this device takes no requests of `mqtt.pool`"
    assert daemon.log.read_text().count(sentence) == 1
    daemon.close()
    old.close()


def test_mqtt_login_is_tried_in_the_version_of_the_broker(broker: Broker) -> None:
    old = OldBroker(broker.port)
    host, _, port = old.address.partition(":")
    assert try_login(MqttConfig(host=host, port=int(port)), "doctor") is None
    assert old.refused == 1
    old.close()


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_mqtt_retained_requests_are_not_served(
    serve: StartDaemon, broker: Broker, listen: Listen, version: str
) -> None:
    listener = listen(broker, "edgelm/dev/response/#")
    listener.publish(REQUEST, {"id": "kept", "prompt": "x"}, retain=True)
    old = OldBroker(broker.port)
    daemon = serve(address=None if version == "5" else old.address)
    listener.publish(REQUEST, {"id": "fresh", "prompt": "x"})

    assert listener.heard.get(timeout=TIMEOUT_S).topic == "edgelm/dev/response/fresh"
    daemon.signal(signal.SIGTERM)
    assert daemon.exit_code() == 0
    old.close()


@pytest.mark.slow
def test_mqtt_answer_that_did_not_arrive_is_published_by_the_next_daemon(
    serve: StartDaemon, broker: Broker, listen: Listen
) -> None:
    """To a broker of the old version, which drops the first attempt."""
    daemon = serve(backend="fake:50")
    listener = listen(broker)
    listener.publish(REQUEST, {"id": "a", "prompt": "Once", "steps": 10, "stream": True})
    listener.next("edgelm/dev/stream/a")
    broker.stop()
    line = daemon.line()
    until(lambda: line.ask({"type": "health"})["state"] == "idle", "the story to end")
    daemon.signal(signal.SIGTERM)
    assert daemon.exit_code() == 0
    broker.start()
    old = OldBroker(broker.port)
    second = listen(broker)
    serve(address=old.address)
    answer = second.next("edgelm/dev/response/a")
    assert json.loads(answer.payload)["status"] == "ok" and old.refused == 1
    old.close()
