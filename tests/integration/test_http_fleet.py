"""`GET /fleet`: the devices of a real broker, asked of a real daemon; and what it costs who does not ask."""

import json
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edge.transports.http.fleet import MAX_READERS
from edge.transports.mqtt.fleet_on_demand import FRESH_S, LOOK_S
from edge.transports.mqtt.fleet_watch import RETRY_S
from tests.integration.harness import Broker, Daemon, Listener, run_module, until
from tests.integration.http_client import address_of, ask

STATE = {"type": "health", "state": "idle", "queued": 3, "model": "m@1", "backend": "ort", "version": "9"}


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon], broker: Broker) -> Daemon:
    """On a broker, with HTTP."""
    return start_daemon("--mqtt", broker.address, "--http", "127.0.0.1:0", DEVICE="kitchen")


def connections(daemon: Daemon, broker: Broker) -> int:
    """Of a daemon to its broker: its own, and that by which it listens to the fleet."""
    own = {str(link.readlink()) for link in Path(f"/proc/{daemon.process.pid}/fd").iterdir() if link.is_symlink()}
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    peer = f"0100007F:{broker.port:04X}"
    return sum(row[2] == peer and f"socket:[{row[9]}]" in own for row in rows)


def threads(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.process.pid}/task").iterdir()))


def by_name(daemon: Daemon) -> dict[str, dict[str, Any]]:
    answer = ask(daemon, "/fleet")
    assert answer.status == 200, answer
    return {device["device"]: device for device in answer.object["devices"]}


def well(daemon: Daemon) -> set[str]:
    return {name for name, device in by_name(daemon).items() if device["state"] == "idle"}


@pytest.mark.slow
def test_http_fleet_is_what_the_command_shows(daemon: Daemon, broker: Broker, listen: Callable[..., Listener]) -> None:
    listen(broker).publish("edgelm/attic/state", STATE, retain=True)
    until(lambda: {"attic", "kitchen"} <= well(daemon), "both devices")
    shown = ask(daemon, "/fleet").object
    told = json.loads(run_module("edge.fleet", "--mqtt", broker.address, "--json").stdout)

    for fleet in (shown, told):
        for device in fleet["devices"]:
            device.pop("seen_s_ago")
    assert shown == told
    assert shown["broker"] == broker.address and shown["connected"] and not shown["left_out"]
    kitchen = by_name(daemon)["kitchen"]
    assert (kitchen["state"], kitchen["backend"], kitchen["queued"]) == ("idle", "fake", 0)
    assert by_name(daemon)["attic"]["queued"] == 3


@pytest.mark.slow
def test_http_fleet_follows_what_happens(daemon: Daemon, broker: Broker, listen: Callable[..., Listener]) -> None:
    other = listen(broker)
    other.publish("edgelm/attic/state", STATE)
    until(lambda: "kitchen" in well(daemon), "the device itself")
    other.publish("edgelm/attic/state", STATE)
    until(lambda: by_name(daemon).get("attic", {}).get("state") == "idle", "another one")
    other.publish("edgelm/attic/availability", b"offline")
    until(lambda: by_name(daemon)["attic"]["state"] == "vanished", "its end")


@pytest.mark.slow
def test_http_fleet_listens_only_while_somebody_asks(daemon: Daemon, broker: Broker) -> None:
    until(lambda: connections(daemon, broker) == 1, "its own connection")
    before = threads(daemon)
    for _ in range(5):
        by_name(daemon)
    assert connections(daemon, broker) == 2 and threads(daemon) > before
    time.sleep(LOOK_S)
    until(lambda: connections(daemon, broker) == 1, "it hangs up")
    by_name(daemon)
    assert connections(daemon, broker) == 2


def test_http_fleet_is_looked_at_once_a_second(daemon: Daemon) -> None:
    by_name(daemon)
    began_s = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(daemon, "/fleet"), range(80)))
    assert {answer.status for answer in answers} <= {200, 429}
    bodies = {answer.body for answer in answers if answer.status == 200}
    assert 1 <= len(bodies) <= 2 + (time.monotonic() - began_s) / FRESH_S


@pytest.mark.slow
def test_http_fleet_says_that_the_broker_is_lost(daemon: Daemon, broker: Broker) -> None:
    until(lambda: "kitchen" in well(daemon), "the device itself")
    broker.stop()
    until(lambda: not ask(daemon, "/fleet").object["connected"], "the loss")
    assert "kitchen" in by_name(daemon), "heard last"
    broker.start()
    until(lambda: bool(ask(daemon, "/fleet").object["connected"]), "its return")


@pytest.mark.slow
def test_http_fleet_whose_broker_is_not_there_is_refused_in_a_sentence(daemon: Daemon, broker: Broker) -> None:
    broker.stop()
    refused = [ask(daemon, "/fleet") for _ in range(3)]
    assert {(answer.status, answer.error["code"]) for answer in refused} == {(502, "broker_lost")}
    assert f"the broker {broker.address} cannot be reached" in refused[0].error["message"]
    assert refused[0].headers["retry-after-ms"] == str(RETRY_S * 1000)
    broker.start()
    until(lambda: ask(daemon, "/fleet").status == 200, "its return")
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.slow
def test_http_fleet_has_few_readers_at_once(start_daemon: Callable[..., Daemon]) -> None:
    """What listens there takes connections and says nothing, so that all of them wait; then each gets its sentence."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        daemon = start_daemon("--mqtt", f"127.0.0.1:{silent.getsockname()[1]}", "--http", "127.0.0.1:0")
        with ThreadPoolExecutor(MAX_READERS + 4) as pool:
            answers = list(pool.map(lambda _: ask(daemon, "/fleet"), range(MAX_READERS + 4)))
        codes = sorted(answer.error["code"] for answer in answers)
        assert codes == ["broker_lost"] * MAX_READERS + ["queue_full"] * 4
        assert ask(daemon, "/health").status == 200


@pytest.mark.slow
def test_http_fleet_hanging_up_frees_a_place(start_daemon: Callable[..., Daemon]) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        daemon = start_daemon("--mqtt", f"127.0.0.1:{silent.getsockname()[1]}", "--http", "127.0.0.1:0")
        for _ in range(3 * MAX_READERS):
            with socket.create_connection(address_of(daemon)) as client:
                client.sendall(b"GET /fleet HTTP/1.1\r\nHost: localhost\r\n\r\n")
                client.settimeout(0.05)
                with pytest.raises(TimeoutError):
                    client.recv(1)


def test_http_fleet_ends_with_the_daemon(daemon: Daemon) -> None:
    by_name(daemon)
    began_s = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.exit_code() == 0 and time.monotonic() - began_s < 5
    assert "Traceback" not in daemon.log.read_text()


def test_http_fleet_wants_the_token(start_daemon: Callable[..., Daemon], broker: Broker, tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("s3cret-s3cret-s3cret\n")
    secret.chmod(0o600)
    flags = ("--mqtt", broker.address, "--http", "127.0.0.1:0")
    guarded = start_daemon(*flags, HTTP_TOKEN_FILE=str(secret))
    assert ask(guarded, "/fleet").error["code"] == "unauthorized"
    assert ask(guarded, "/fleet", headers={"Authorization": "Bearer s3cret-s3cret-s3cret"}).status == 200


def test_http_fleet_of_this_machine_is_not_for_other_pages(daemon: Daemon) -> None:
    assert ask(daemon, "/fleet", headers={"Origin": "http://evil.example"}).error["code"] == "forbidden"
    assert ask(daemon, "/fleet", headers={"Host": "evil.example"}).error["code"] == "forbidden"


def test_http_fleet_answers_as_the_document_says(daemon: Daemon) -> None:
    document = ask(daemon, "/openapi.json").object
    answers = document["paths"]["/fleet"]["get"]["responses"]
    assert answers["200"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/FleetView"}
    assert {"401", "429", "502", "503"} <= answers.keys()
    jsonschema = pytest.importorskip("jsonschema_rs", reason="of schemathesis")
    until(lambda: "kitchen" in well(daemon), "the device itself")
    schema = document | {"$ref": "#/components/schemas/FleetView"}
    jsonschema.validate(schema, ask(daemon, "/fleet").object)


def test_http_fleet_without_a_broker_says_so(start_daemon: Callable[..., Daemon]) -> None:
    alone = start_daemon("--http", "127.0.0.1:0")
    answer = ask(alone, "/fleet")
    assert (answer.status, answer.error["code"]) == (404, "not_found") and "set `mqtt.host`" in answer.error["message"]
    assert "/fleet" not in ask(alone, "/openapi.json").object["paths"]
    assert ask(alone, "/fleet", method="POST").error["code"] == "method_not_allowed"
