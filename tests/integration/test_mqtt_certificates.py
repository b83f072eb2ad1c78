"""A broker that asks clients for certificates, and topics below a base of one's own."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge.config import MqttConfig
from edge.transports.mqtt.login import client_certificate, try_login
from shared.errors import ConfigError
from tests.integration.harness import Broker, Daemon, Listener, run_module, until
from tests.support.certificates import make_authority, make_certificate, openssl

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A broker's, a device's, a stranger's of the same name by another authority, and a key with a passphrase."""
    folder = tmp_path_factory.mktemp("certs")
    make_authority(folder, "ca")
    make_authority(folder, "other")
    make_certificate(folder, "broker", "localhost", authority="ca", names="DNS:localhost,IP:127.0.0.1")
    make_certificate(folder, "edge01", "edge01", authority="ca")
    make_certificate(folder, "stranger", "edge01", authority="other")
    openssl(folder, "ec", "-aes256", "-passout", "pass:x", "-in", "edge01.key", "-out", "locked.key")
    return folder


@pytest.fixture
def broker(make_broker: Callable[..., Broker], certificates: Path) -> Broker:
    """It takes the user's name from the certificate."""
    files = {"cafile": "ca.pem", "certfile": "broker.pem", "keyfile": "broker.key"}
    lines = [f"{key} {certificates / file}" for key, file in files.items()]
    return make_broker(*lines, "require_certificate true", "use_identity_as_username true").start()


@pytest.fixture
def config(broker: Broker, certificates: Path) -> MqttConfig:
    return MqttConfig(
        host="127.0.0.1",
        port=broker.port,
        ca_file=certificates / "ca.pem",
        tls_cert=certificates / "edge01.pem",
        tls_key=certificates / "edge01.key",
    )


def settings(config: MqttConfig) -> dict[str, str]:
    files = {"MQTT_CA_FILE": config.ca_file, "MQTT_TLS_CERT": config.tls_cert, "MQTT_TLS_KEY": config.tls_key}
    return {name: str(file) for name, file in files.items()}


def test_mqtt_certificate_lets_the_daemon_in(
    broker: Broker, config: MqttConfig, start_daemon: Callable[..., Daemon]
) -> None:
    daemon = start_daemon("--mqtt", broker.address, DEVICE="edge01", **settings(config))
    until(lambda: "mqtt connected" in daemon.log.read_text(), "the connection")
    login = ["--cafile", str(config.ca_file), "--cert", str(config.tls_cert), "--key", str(config.tls_key)]
    topics = ["-t", "edgelm/edge01/request/generate", "-e", "edgelm/edge01/response/try"]
    answer = broker.tool("mosquitto_rr", "-V", "5", "-q", "1", *login, *topics, "-W", "10", "-m", "Once")
    assert json.loads(answer)["status"] == "ok"


# paho leaves failed TLS to the collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_mqtt_certificate_that_is_refused_has_one_sentence(config: MqttConfig, certificates: Path) -> None:
    assert try_login(config, "edgelm-edge01-doctor") is None
    stranger = {"tls_cert": certificates / "stranger.pem", "tls_key": certificates / "stranger.key"}
    for changed in ({"tls_cert": None, "tls_key": None}, stranger):
        why = try_login(replace(config, **changed), "edgelm-edge01-doctor")
        assert why is not None and f"127.0.0.1:{config.port}" in why and "`mqtt.tls_cert`" in why


BAD_FILES = {
    "no such key": ({"tls_key": "none.key"}, "mqtt.tls_key {}/none.key cannot be read: No such file or directory"),
    "no such certificate": ({"tls_cert": "none.pem"}, "mqtt.tls_cert {}/none.pem cannot be read: No such file"),
    "passphrase": ({"tls_key": "locked.key"}, "mqtt.tls_key {}/locked.key is encrypted"),
    "another's key": ({"tls_key": "stranger.key"}, "stranger.key are no certificate with its private key in PEM"),
    "no key at all": ({"tls_key": "edge01.pem"}, "edge01.pem are no certificate with its private key in PEM"),
    "no certificate": ({"tls_cert": "edge01.key"}, "edge01.key and mqtt.tls_key"),
}


@pytest.mark.parametrize(("changed", "sentence"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_mqtt_certificate_that_cannot_be_used_ends_the_daemon_at_its_start(
    config: MqttConfig, certificates: Path, debug_bundle: Path, tmp_path: Path, changed: dict[str, str], sentence: str
) -> None:
    files = settings(replace(config, **{key: certificates / name for key, name in changed.items()}))
    files |= {"SOCKET": str(tmp_path / "s"), "STATE": str(tmp_path)}
    program = ["--bundle", str(debug_bundle), "--backend", "fake", "--mqtt", f"127.0.0.1:{config.port}"]
    done = run_module("edge", *program, temporary=None, **files)
    assert done.returncode == 78
    assert sentence.format(certificates) in done.stderr and done.stderr.strip().count("\n") == 0


def test_mqtt_certificate_of_the_service_is_a_credential(
    config: MqttConfig, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty where /etc/edgelm has no such file; what the settings name comes first."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    bare = replace(config, tls_cert=None, tls_key=None)
    for name in ("mqtt.cert", "mqtt.key"):
        (tmp_path / name).write_text("\n")
    assert client_certificate(bare) is None
    shutil.copy(certificates / "edge01.pem", tmp_path / "mqtt.cert")
    with pytest.raises(ConfigError, match=r"mqtt\.key go together"):
        client_certificate(bare)
    shutil.copy(certificates / "edge01.key", tmp_path / "mqtt.key")
    assert client_certificate(bare) == (tmp_path / "mqtt.cert", tmp_path / "mqtt.key")
    assert try_login(bare, "edgelm-edge01-doctor") is None
    assert client_certificate(config) == (config.tls_cert, config.tls_key)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every file")
def test_mqtt_certificate_that_may_not_be_read_is_named(config: MqttConfig, certificates: Path) -> None:
    (certificates / "closed.key").touch(mode=0)
    why = try_login(replace(config, tls_key=certificates / "closed.key"), "edgelm-edge01-doctor")
    assert why is not None and "closed.key cannot be read: Permission denied" in why


def test_mqtt_base_topic_is_where_everything_is(
    make_broker: Callable[..., Broker],
    listen: Callable[..., Listener],
    start_daemon: Callable[..., Daemon],
) -> None:
    open_broker = make_broker().start()
    listener = listen(open_broker, "#")
    daemon = start_daemon("--mqtt", open_broker.address, DEVICE="dev", MQTT_BASE_TOPIC="home/stories")
    assert "-t home/stories/dev/request/generate -e home/stories/dev/response/try" in daemon.process.stdout.readline()  # type: ignore[union-attr]
    seen = {listener.heard.get(timeout=20).topic for _ in range(4)}
    assert seen == {f"home/stories/dev/{kind}" for kind in ("availability", "info", "state", "metrics")}
    request = {"id": "a", "prompt": "Once", "max_tokens": 4}
    listener.publish("home/stories/dev/request/generate", request)
    assert json.loads(listener.next("home/stories/dev/response/a").payload)["status"] == "ok"
    listener.publish("home/stories/dev/request/generate", request | {"id": "b"}, ResponseTopic="home/stories/reply/me")
    assert json.loads(listener.next("home/stories/reply/me").payload)["status"] == "ok"
    listener.publish("home/stories/dev/request/generate", request | {"id": "c"}, ResponseTopic="edgelm/reply/me")
    refusal = json.loads(listener.next("home/stories/dev/response/c").payload)
    assert "below home/stories/reply/ and home/stories/dev/response" in refusal["error"]["message"]
