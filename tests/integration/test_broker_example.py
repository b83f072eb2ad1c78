"""The broker of deploy/mosquitto as it ships: TLS, a password for everyone, and each user below its own topics."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.harness import PATIENCE_S, ROOT, Broker, Daemon, until

SHIPPED = ROOT / "deploy" / "mosquitto"
USERS = ("edge01", "edge02", "alice", "bob", "monitor")

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the README of deploy/mosquitto makes them."""
    folder = tmp_path_factory.mktemp("certs")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")  # quicker to make than RSA
    openssl(folder, "req", "-x509", *key, "-subj", "/CN=edgelm CA", "-keyout", "ca.key", "-out", "ca.pem")
    openssl(folder, "req", *key, "-subj", "/CN=localhost", "-keyout", "broker.key", "-out", "broker.csr")
    (folder / "san.cnf").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "san.cnf", "-out", "broker.pem")
    openssl(folder, "x509", "-req", "-in", "broker.csr", *signed)
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
    return process.communicate(timeout=PATIENCE_S)[0]


@pytest.fixture
def daemon(broker: Broker, certificates: Path, start_daemon: Callable[..., Daemon], tmp_path: Path) -> Iterator[Daemon]:
    """Device edge01, connected."""
    (tmp_path / "password").write_text("edge01-pw\n")
    daemon = start_daemon(
        "--mqtt",
        broker.address,
        DEVICE="edge01",
        MQTT_USERNAME="edge01",
        MQTT_PASSWORD_FILE=str(tmp_path / "password"),
        MQTT_CA_FILE=str(certificates / "ca.pem"),
    )
    until(lambda: "mqtt connected" in daemon.log.read_text(), "the connection")
    yield daemon


def ask(broker: Broker, certificates: Path, user: str, reply_topic: str, device: str = "edge01") -> str:
    """What mosquitto_rr hears within two seconds."""
    request = ["-t", f"edgelm/{device}/request/generate", "-e", reply_topic, "-W", "2", "-m", '{"prompt": "Once"}']
    return said(tool(broker, certificates, "mosquitto_rr", user, *request))


def test_a_client_is_answered_on_its_own_topic(broker: Broker, certificates: Path, daemon: Daemon) -> None:
    assert json.loads(ask(broker, certificates, "alice", "edgelm/reply/alice/1"))["status"] == "ok"


def test_a_client_without_a_block_of_its_own_asks_in_vain(broker: Broker, certificates: Path, daemon: Daemon) -> None:
    assert "status" not in ask(broker, certificates, "bob", "edgelm/reply/bob/1")


def test_a_client_cannot_read_what_others_are_told(broker: Broker, certificates: Path, daemon: Daemon) -> None:
    assert "status" not in ask(broker, certificates, "alice", "edgelm/reply/bob/1")


def test_a_monitor_sees_availability_and_no_text(broker: Broker, certificates: Path, daemon: Daemon) -> None:
    watching = tool(broker, certificates, "mosquitto_sub", "monitor", "-t", "edgelm/#", "-v", "-W", "3")
    assert watching.stdout is not None
    assert watching.stdout.readline() == "edgelm/edge01/availability online\n"
    assert json.loads(ask(broker, certificates, "alice", "edgelm/reply/alice/2"))["status"] == "ok"
    assert "Once" not in said(watching)


def test_a_device_cannot_speak_for_another(broker: Broker, certificates: Path, daemon: Daemon) -> None:
    watching = tool(broker, certificates, "mosquitto_sub", "alice", "-t", "edgelm/+/availability", "-v", "-W", "2")
    assert watching.stdout is not None
    assert watching.stdout.readline() == "edgelm/edge01/availability online\n"
    said(tool(broker, certificates, "mosquitto_pub", "edge02", "-t", "edgelm/edge01/availability", "-m", "offline"))
    said(tool(broker, certificates, "mosquitto_pub", "edge02", "-t", "edgelm/edge02/availability", "-m", "online"))
    heard = said(watching)
    assert "edgelm/edge02/availability online" in heard and "offline" not in heard


def test_nobody_enters_without_a_password(broker: Broker, certificates: Path) -> None:
    anonymous = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(broker.port), "-t", "x", "-m", "y"]
    done = subprocess.run(
        [*anonymous, "--cafile", str(certificates / "ca.pem")], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode != 0 and "not authorised" in done.stderr.lower()
