"""Settings: file, environment, flags, in rising order; and one sentence for each that cannot be used."""

import importlib.util
import os
import re
import socket as sockets
from pathlib import Path

import pytest

import edge.config
from edge.config import (
    VARIABLES,
    Config,
    HomeAssistantConfig,
    MqttConfig,
    default_device,
    default_socket,
    load_config,
    parse_broker,
    read_password,
)
from shared.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    file = folder / "edgelm.toml"
    file.write_text(text)
    return file


def test_config_without_settings_is_the_defaults() -> None:
    config = load_config(environ={})
    assert config == Config()
    assert (config.backend, config.threads, config.queue_size) == ("auto", 0, 32)
    assert config.mqtt.host is None


def test_config_flags_override_environment_overrides_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'backend = "file"\nthreads = 1\nqueue_size = 1\n[mqtt]\nhost = "file"\nport = 1')
    environ = {"EDGELM_THREADS": "2", "EDGELM_QUEUE_SIZE": "2", "EDGELM_MQTT_PORT": "2"}
    config = load_config(file, {"queue_size": "3"}, environ)

    assert (config.backend, config.threads, config.queue_size) == ("file", 1 + 1, 3)
    assert (config.mqtt.host, config.mqtt.port) == ("file", 2)


def test_config_every_variable_reaches_its_setting() -> None:
    values = dict.fromkeys(VARIABLES, "7") | {"EDGELM_HTTP_LISTEN": "7:7", "EDGELM_HOMEASSISTANT_DISCOVERY": "true"}
    config = load_config(environ=values)
    for key in VARIABLES.values():
        section, _, name = key.rpartition(".")
        found = getattr(getattr(config, section) if section else config, name)
        assert found in (7, "7", Path.cwd() / "7", "7:7", True), key


def test_config_empty_variable_counts_as_unset() -> None:
    assert load_config(environ={"EDGELM_MQTT_HOST": ""}) == Config()


def test_config_variable_names_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "threads = 5")
    assert load_config(environ={"EDGELM_CONFIG": str(file)}).threads == 5


def test_config_paths_in_the_file_start_at_its_folder(tmp_path: Path) -> None:
    file = write(tmp_path, 'bundle = "mine"\nsocket = "/run/s"')
    assert load_config(file, environ={}).bundle == tmp_path / "mine"
    assert load_config(file, environ={}).socket == Path("/run/s")
    assert load_config(file, {"bundle": "mine"}, {}).bundle == Path.cwd() / "mine"


def test_config_example_is_valid_and_names_every_key() -> None:
    example = Path(__file__).parents[3] / "deploy" / "edgelm.toml"
    config = load_config(example, environ={})
    assert config == Config()
    text = example.read_text()
    for key in (*Config.__struct_fields__, *MqttConfig.__struct_fields__, *HomeAssistantConfig.__struct_fields__):
        assert f"\n# {key} = " in text or f"\n[{key}]\n" in text, key
    for variable in VARIABLES:
        assert variable in text


def test_config_page_is_what_the_structs_say() -> None:
    spec = importlib.util.spec_from_file_location("page", Path(__file__).parents[3] / "docs" / "configuration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text("utf-8") == module.page(), "run: python docs/configuration.py"


def test_config_example_comments_the_defaults(tmp_path: Path) -> None:
    example = (Path(__file__).parents[3] / "deploy" / "edgelm.toml").read_text()
    stated = ("backend", "threads", "queue_size", "drain_s", "port", "base_topic")
    lines = [line.removeprefix("# ") for line in example.splitlines()]
    kept = "\n".join(line for line in lines if line == "[mqtt]" or line.partition(" = ")[0] in stated)
    assert kept.count(" = ") == len(stated)
    assert load_config(write(tmp_path, kept), environ={}) == Config()


BAD_FILES = {
    "unknown key": ('sokcet = "/s"', "unknown field `sokcet`"),
    "unknown key of a section": ('[mqtt]\nhots = "h"', "unknown field `hots` in `mqtt`"),
    "wrong type": ('threads = "two"', "`threads`"),
    "boolean for a number": ("threads = true", "`threads`"),
    "too small": ("queue_size = 0", "`queue_size`"),
    "too large": ("[mqtt]\nport = 65536", "`mqtt.port`"),
    "no path": ("bundle = 3", "`bundle`"),
    "empty path": ('bundle = ""', "`bundle`"),
    "not for topics": ('device = "a/b"', "`device` must be 1 to 64 letters, digits, `.`, `_` and `-`"),
    "unknown name": ('sokcet = "/s"', "unknown field `sokcet`: known are `bundle`, `socket`"),
    "line break in a name": ('device = "a\\n"', "`device`"),
    "discovery that is no boolean": ('[homeassistant]\ndiscovery = "yes"', "`homeassistant.discovery`"),
    "wildcard in the base": ('[mqtt]\nbase_topic = "home/+"', "`mqtt.base_topic` must be topic levels"),
    "base ends in a slash": ('[mqtt]\nbase_topic = "home/"', "`mqtt.base_topic`"),
    "base of the broker's own": ('[mqtt]\nbase_topic = "$SYS"', "`mqtt.base_topic`"),
    "certificate without its key": ('[mqtt]\nca_file = "c"\ntls_cert = "c"', "mqtt.tls_key go together"),
    "key without its certificate": ('[mqtt]\nca_file = "c"\ntls_key = "k"', "give both or neither"),
    "certificate without TLS": ('[mqtt]\ntls_cert = "c"\ntls_key = "k"', "mqtt.tls_cert needs mqtt.ca_file"),
    "wildcard": ('[mqtt]\nreply_prefixes = ["#"]', "`mqtt.reply_prefixes[0]`"),
    "password without a name": ('[mqtt]\npassword_file = "p"', "mqtt.username"),
    "no TOML": ("socket: /s", "line 1"),
}


@pytest.mark.parametrize(("text", "named"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_config_bad_setting_is_named_with_its_file(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), environ={})
    assert named in str(caught.value)
    assert str(caught.value).startswith("mqtt.") or str(tmp_path / "edgelm.toml") in str(caught.value)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("name", ["pool", "reply", "request", "response", "stream", "state", "claim"])
def test_config_level_of_the_topics_names_no_device_and_no_pool(tmp_path: Path, name: str) -> None:
    for text, key in ((f'device = "{name}"', "device"), (f'[mqtt]\nhost = "h"\npool = "{name}"', "mqtt.pool")):
        with pytest.raises(ConfigError, match=f"{key} cannot be '{name}', which is a level of the topics"):
            load_config(write(tmp_path, text), environ={})


def test_config_pool_is_a_name_and_needs_a_broker() -> None:
    named = {"EDGELM_MQTT_POOL": "kitchen", "EDGELM_MQTT_HOST": "h"}
    assert load_config(environ=named).mqtt.pool == "kitchen"
    with pytest.raises(ConfigError, match=r"mqtt\.pool needs mqtt\.host"):
        load_config(environ={"EDGELM_MQTT_POOL": "kitchen"})
    for bad in ("a/b", "+", "#", "$share", "a b", "x" * 65):
        with pytest.raises(ConfigError, match=r"EDGELM_MQTT_POOL: `mqtt\.pool` must be 1 to 64 letters"):
            load_config(environ=named | {"EDGELM_MQTT_POOL": bad})


def test_config_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        load_config(tmp_path / "none.toml", environ={})
    (tmp_path / "edgelm.toml").write_bytes(b'backend = "\xff"')
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "edgelm.toml", environ={})


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (
            {"EDGELM_THREADS": "two"},
            'EDGELM_THREADS: `threads` must be an integer, at least 0 and at most 256, not "two"',
        ),
        ({"EDGELM_MQTT_PORT": "0"}, "EDGELM_MQTT_PORT: `mqtt.port` must be an integer, at least 1"),
        ({"EDGELM_SOKCET": "/s"}, "unknown environment variable EDGELM_SOKCET"),
    ],
)
def test_config_bad_variable_is_named(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environ=environ)
    assert named in str(caught.value)


def test_config_bad_flag_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--mqtt: `mqtt\.port` must be an integer, at least 1 and at most 65535"):
        load_config(flags=parse_broker("host:99999"), environ={})


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("broker.local", "broker.local", 1883),
        ("10.0.0.1:99", "10.0.0.1", 99),
        ("[::1]:99", "::1", 99),
        ("[::1]", "::1", 1883),
    ],
)
def test_config_broker_is_host_and_port(text: str, host: str, port: int) -> None:
    mqtt = load_config(flags=parse_broker(text), environ={}).mqtt
    assert (mqtt.host, mqtt.port) == (host, port)


@pytest.mark.parametrize("text", ["", ":1883", "host:", "host:mqtt", "::1", "a b"])
def test_config_broker_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST"):
        parse_broker(text)


def test_config_password_is_the_file_without_its_line_break(tmp_path: Path) -> None:
    (tmp_path / "p").write_text(" s3cret \r\n")
    assert read_password(MqttConfig(password_file=tmp_path / "p")) == " s3cret "
    assert read_password(MqttConfig()) is None


def test_config_socket_lies_in_the_first_writable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_socket() == tmp_path / "edgelm.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    assert default_socket() in (Path("/run/edgelm.sock"), Path(f"/tmp/edgelm-{os.getuid()}.sock"))


@pytest.mark.parametrize(
    ("host", "device"),
    [("jetson.lan", "jetson"), ("a b/c", "a-b-c"), ("--", "edge"), ("", "edge"), ("x" * 99, "x" * 59)],
)
def test_config_default_device_names_host_and_machine(
    host: str, device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sockets, "gethostname", lambda: host)
    monkeypatch.setattr(edge.config, "MACHINE_ID", tmp_path / "machine-id")
    assert default_device() == device
    names = set()
    for machine_id in ("0123456789abcdef0123456789abcdef\n", "fedcba9876543210fedcba9876543210\n"):
        (tmp_path / "machine-id").write_text(machine_id)
        names.add(name := default_device())
        assert re.fullmatch(re.escape(device) + "-[0-9a-f]{4}", name) and name[-4:] not in machine_id
        assert load_config(environ={"EDGELM_DEVICE": name}).device == name
    assert len(names) == 2
