"""The broker of deploy/mosquitto as it ships: TLS, a password for everyone, and each user below its own topics."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge.config import MqttConfig
from edge.transports.mqtt.login import try_login
from tests.integration import http_client
from tests.integration.harness import ROOT, TIMEOUT_S, Broker, Daemon, run_module, until
from tests.support.certificates import make_authority, make_certificate

SHIPPED = ROOT / "deploy" / "mosquitto"
USERS = ("edge01", "edge02", "alice", "bob", "monitor", "homeassistant")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the README of deploy/mosquitto makes them."""
    folder = tmp_path_factory.mktemp("certs")
    make_authority(folder, "ca")
    make_certificate(folder, "broker", "localhost", authority="ca", names="DNS:localhost,IP:127.0.0.1")
    return folder


@pytest.fixture
def broker(make_broker: Callable[..., Broker], certificates: Path, tmp_path: Path) -> Broker:
    """The shipped configuration, at this test's places and on its port."""
    passwords = tmp_path / "passwd"
    passwords.touch(mode=0o600)
    for user in USERS:
        subprocess.run(["mosquitto_passwd", "-b", str(passwords), user, f"{user}-pw"], check=True)
    places = {
        "/etc/mosquitto/certs": str(certificates),
        "/etc/mosquitto/edgelm.passwd": str(passwords),
        "/etc/mosquitto/edgelm.acl": str(SHIPPED / "edgelm.acl"),
        "/var/lib/mosquitto/": f"{tmp_path}/",
    }
    text = (SHIPPED / "edgelm.conf").read_text()
    for shipped, here in places.items():
        assert shipped in text
        text = text.replace(shipped, here)
    settings = [line for line in text.splitlines() if not line.startswith(("listener", "allow_anonymous"))]
    broker = make_broker()
    as_root = ["user root"] if os.getuid() == 0 else []
    lines = [f"listener {broker.port} 127.0.0.1", "allow_anonymous false", *as_root, *settings, ""]
    broker._config.write_text("\n".join(lines))
    return broker.start()


def tool(broker: Broker, certificates: Path, name: str, user: str, *arguments: str) -> "subprocess.Popen[str]":
    login = ["-u", user, "-P", f"{user}-pw", "--cafile", str(certificates / "ca.pem"), "-V", "5", "-q", "1"]
    command = [name, "-h", "127.0.0.1", "-p", str(broker.port), *login, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def said(process: "subprocess.Popen[str]") -> str:
    return process.communicate(timeout=TIMEOUT_S)[0]


@pytest.fixture
def daemon(broker: Broker, certificates: Path, start_daemon: Callable[..., Daemon], tmp_path: Path) -> Iterator[Daemon]:
    """Device edge01, connected."""
    (tmp_path / "password").write_text("edge01-pw\n")
    daemon = start_daemon(
        "--mqtt",
        broker.address,
        "--http",
        "127.0.0.1:0",
        backend="fake:20",
        DEVICE="edge01",
        MQTT_USERNAME="edge01",
        MQTT_PASSWORD_FILE=str(tmp_path / "password"),
        MQTT_CA_FILE=str(certificates / "ca.pem"),
    )
    until(lambda: "mqtt connected" in daemon.log.read_text(), "the connection")
    yield daemon


def ask(broker: Broker, certificates: Path, user: str, client: str, *more: str) -> str:
    """What mosquitto_rr hears within two seconds of a request that a user sends in a client's name."""
    topics = ["-t", f"edgelm/edge01/request/generate/{client}", "-e", f"edgelm/edge01/response/{client}/1"]
    request = more or ("-m", '{"prompt": "Once"}')
    return said(tool(broker, certificates, "mosquitto_rr", user, *topics, "-W", "2", *request))


def listen(broker: Broker, certificates: Path, user: str) -> "subprocess.Popen[str]":
    """A user who subscribes to everything, and has its subscription."""
    watching = tool(broker, certificates, "mosquitto_sub", user, "-t", "edgelm/#", "-v", "-W", "6")
    assert watching.stdout is not None
    assert watching.stdout.readline() == "edgelm/edge01/availability online\n"
    return watching


def test_broker_example_answers_a_client_on_its_own_topic(broker: Broker, certificates: Path, daemon: Daemon) -> None:
    assert json.loads(ask(broker, certificates, "alice", "alice"))["status"] == "ok"
    assert json.loads(ask(broker, certificates, "bob", "bob"))["status"] == "ok"


def test_broker_example_lets_nobody_ask_in_anothers_name(broker: Broker, certificates: Path, daemon: Daemon) -> None:
    assert "status" not in ask(broker, certificates, "bob", "alice")
    plain = ["-t", "edgelm/edge01/request/generate", "-e", "edgelm/edge01/response/bob/1", "-W", "2", "-m", "Once"]
    assert "status" not in said(tool(broker, certificates, "mosquitto_rr", "bob", *plain))
    published = ["-t", "edgelm/edge01/response/alice/1", "-m", '{"status": "ok"}']
    watching = listen(broker, certificates, "alice")
    said(tool(broker, certificates, "mosquitto_pub", "bob", *published))
    assert "response/alice" not in said(watching)


def test_broker_example_keeps_answers_and_streams_from_other_clients(
    broker: Broker, certificates: Path, daemon: Daemon
) -> None:
    watching = {user: listen(broker, certificates, user) for user in ("alice", "bob", "monitor")}
    request = '{"id": "a", "prompt": "Once", "stream": true, "steps": 30}'
    said(
        tool(
            broker, certificates, "mosquitto_pub", "alice", "-t", "edgelm/edge01/request/generate/alice", "-m", request
        )
    )
    heard = {user: said(process) for user, process in watching.items()}
    assert "edgelm/edge01/response/alice/a" in heard["alice"] and "edgelm/edge01/stream/alice/a" in heard["alice"]
    assert "Once" not in heard["bob"] and "Once" not in heard["monitor"]


def test_broker_example_lets_nobody_cancel_anothers_request(broker: Broker, certificates: Path, daemon: Daemon) -> None:
    """By the broker on alice's topic; on bob's own by the daemon, which tells the clients' ids apart."""
    watching = listen(broker, certificates, "alice")
    request = '{"id": "a", "prompt": "Once", "steps": 60}'
    topic = "edgelm/edge01/request"
    said(tool(broker, certificates, "mosquitto_pub", "alice", "-t", f"{topic}/generate/alice", "-m", request))
    for client in ("alice", "bob"):
        cancel = ["-t", f"{topic}/cancel/{client}", "-m", '{"id": "a"}']
        said(tool(broker, certificates, "mosquitto_pub", "bob", *cancel))
    assert '"status":"ok"' in said(watching)


def test_broker_example_shows_counters_to_the_monitor_alone(broker: Broker, certificates: Path, daemon: Daemon) -> None:
    watching = {user: listen(broker, certificates, user) for user in ("alice", "monitor")}
    daemon.signal(signal.SIGTERM)  # the last thing it says
    heard = {user: said(process) for user, process in watching.items()}
    assert "edgelm/edge01/metrics" in heard["monitor"] and "edgelm/edge01/metrics" not in heard["alice"]


def test_broker_example_lets_home_assistant_find_and_ask_a_device(
    broker: Broker, certificates: Path, start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("edge01-pw\n")
    login = {"MQTT_USERNAME": "edge01", "MQTT_PASSWORD_FILE": str(tmp_path / "password")}
    login |= {"MQTT_CA_FILE": str(certificates / "ca.pem"), "DEVICE": "edge01", "HOMEASSISTANT_DISCOVERY": "true"}
    start_daemon("--mqtt", broker.address, **login)
    until(lambda: (tmp_path / "homeassistant").exists(), "the announcement")
    heard = {
        user: tool(broker, certificates, "mosquitto_sub", user, "-t", "homeassistant/#", "-C", "1", "-W", "3")
        for user in ("homeassistant", "alice")
    }
    told = json.loads(said(heard["homeassistant"]))["components"]
    assert "components" not in said(heard["alice"])
    topics = ["-t", told["prompt"]["command_topic"], "-e", told["story"]["state_topic"], "-W", "5", "-m", "Once"]
    assert json.loads(said(tool(broker, certificates, "mosquitto_rr", "homeassistant", *topics)))["status"] == "ok"
    watching = tool(broker, certificates, "mosquitto_sub", "homeassistant", "-t", "edgelm/edge01/metrics", "-W", "5")
    time.sleep(0.5)
    birth = ["-t", "homeassistant/status", "-m", "online"]
    said(tool(broker, certificates, "mosquitto_pub", "homeassistant", *birth))
    assert '"type":"metrics"' in said(watching)


def test_broker_example_lets_clients_ask_a_pool_each_in_its_own_name(
    broker: Broker, certificates: Path, start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("edge01-pw\n")
    login = {"MQTT_USERNAME": "edge01", "MQTT_PASSWORD_FILE": str(tmp_path / "password")}
    login |= {"MQTT_CA_FILE": str(certificates / "ca.pem"), "DEVICE": "edge01", "MQTT_POOL": "kitchen"}
    daemon = start_daemon("--mqtt", broker.address, **login)
    until(lambda: "mqtt connected" in daemon.log.read_text(), "the connection")
    pool = "edgelm/pool/kitchen"
    watching = {
        user: tool(broker, certificates, "mosquitto_sub", user, "-t", f"{pool}/#", "-t", "nothing", "-v", "-W", "4")
        for user in ("bob", "edge02")
    }
    request = ["-t", f"{pool}/request/generate/alice", "-m", '{"id": "1", "prompt": "Once", "max_tokens": 4}']
    answer = ["-e", f"{pool}/response/alice/1", "-W", "2"]
    assert "status" not in said(tool(broker, certificates, "mosquitto_rr", "bob", *request, *answer))
    claim = f"{'1' * 32}"  # of nothing: only that it is handed on matters
    said(tool(broker, certificates, "mosquitto_pub", "alice", "-t", f"{pool}/claim", "-m", claim))
    assert json.loads(said(tool(broker, certificates, "mosquitto_rr", "alice", *request, *answer)))["status"] == "ok"
    heard = {user: said(process) for user, process in watching.items()}
    assert not any(f"{pool}/" in text for text in heard.values())


def test_broker_example_lets_no_device_speak_for_another(broker: Broker, certificates: Path, daemon: Daemon) -> None:
    watching = tool(broker, certificates, "mosquitto_sub", "alice", "-t", "edgelm/+/availability", "-v", "-W", "2")
    assert watching.stdout is not None
    assert watching.stdout.readline() == "edgelm/edge01/availability online\n"
    said(tool(broker, certificates, "mosquitto_pub", "edge02", "-t", "edgelm/edge01/availability", "-m", "offline"))
    said(tool(broker, certificates, "mosquitto_pub", "edge02", "-t", "edgelm/edge02/availability", "-m", "online"))
    heard = said(watching)
    assert "edgelm/edge02/availability online" in heard and "offline" not in heard


def test_broker_example_lets_nobody_in_without_a_password(broker: Broker, certificates: Path) -> None:
    anonymous = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(broker.port), "-t", "x", "-m", "y"]
    done = subprocess.run(
        [*anonymous, "--cafile", str(certificates / "ca.pem")], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode != 0 and "not authorised" in done.stderr.lower()


def test_broker_example_doctor_logs_in_as_the_daemon_would(
    broker: Broker, certificates: Path, tmp_path: Path, debug_bundle: Path
) -> None:
    """A broker that only takes connections is not enough: exit code 69, and what to mend."""
    secret = tmp_path / "secret"
    settings = {"MQTT_HOST": "127.0.0.1", "MQTT_PORT": str(broker.port), "MQTT_USERNAME": "edge01", "BACKEND": "ort"}
    settings |= {"MQTT_PASSWORD_FILE": str(secret), "MQTT_CA_FILE": str(certificates / "ca.pem")}
    settings |= {"STATE": str(tmp_path), "SOCKET": str(tmp_path / "socket")}
    for password, value, fix in (
        ("edge01-pw", f"{broker.address} accepts our login", None),
        ("wrong", broker.address, f"the broker {broker.address} refuses the login of user 'edge01' (Not authorized): "),
    ):
        secret.write_text(f"{password}\n")
        done = run_module("edge.doctor", "--bundle", str(debug_bundle), "--json", temporary=None, **settings)
        (found,) = (line for line in json.loads(done.stdout)["findings"] if line["name"] == "broker")
        assert found["value"] == value
        assert (found["fix"] or "").startswith(fix or "") and (fix is None) == (found["fix"] is None)
        assert done.returncode == (0 if fix is None else 69)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # paho leaves failed TLS to the collector
def test_broker_example_login_that_fails_has_one_sentence(broker: Broker, certificates: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("edge01-pw\n")
    config = MqttConfig(host="127.0.0.1", port=broker.port, username="edge01", password_file=secret)
    assert try_login(replace(config, ca_file=certificates / "ca.pem"), "edgelm-edge01-doctor") is None
    for changed, sentence in (
        ({}, f"what listens on {broker.address} hangs up: if it is a broker with TLS, set `mqtt.ca_file`"),
        (
            {"username": None, "password_file": None, "ca_file": certificates / "ca.pem"},
            "refuses the login without a user",
        ),
        (
            {"ca_file": certificates / "broker.pem"},
            f"TLS with the broker {broker.address} fails (self-signed certificate in certificate chain): ",
        ),
        ({"ca_file": tmp_path / "none.pem"}, f"mqtt.ca_file {tmp_path / 'none.pem'} cannot be used: "),
        ({"password_file": tmp_path / "none"}, f"mqtt.password_file {tmp_path / 'none'} cannot be read: "),
    ):
        why = try_login(replace(config, **changed), "edgelm-edge01-doctor")
        assert why is not None and sentence in why and "\n" not in why


def test_broker_example_tells_a_device_of_the_others_but_their_counters(daemon: Daemon) -> None:
    """What its own page shows, with its own login."""

    def seen() -> dict[str, object]:
        (device,) = http_client.ask(daemon, "/fleet").object["devices"] or [{}]
        return dict(device)

    until(lambda: seen().get("state") == "idle", "the device")
    assert (seen()["device"], seen()["backend"], seen()["tokens_per_s"]) == ("edge01", "fake", None)
