"""The daemon's settings: one TOML file, overridden by EDGELM_* variables, overridden by command-line flags.

Parsed once at the start into a frozen `Config`.
"""

import hashlib
import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct, field

from edge.system.systemd import credential
from shared.errors import ConfigError
from shared.validation import explain

PREFIX: Final = "EDGELM_"
FILE_VARIABLE: Final = "EDGELM_CONFIG"
LOG_VARIABLE: Final = "EDGELM_LOG"
LEVELS: Final = ("debug", "info", "warning", "error")
VARIABLES: Final[dict[str, str]] = {
    "EDGELM_BUNDLE": "bundle",
    "EDGELM_SOCKET": "socket",
    "EDGELM_STATE": "state",
    "EDGELM_SOCKET_GROUP": "socket_group",
    "EDGELM_BACKEND": "backend",
    "EDGELM_THREADS": "threads",
    "EDGELM_QUEUE_SIZE": "queue_size",
    "EDGELM_DRAIN_S": "drain_s",
    "EDGELM_DEVICE": "device",
    "EDGELM_MQTT_HOST": "mqtt.host",
    "EDGELM_MQTT_PORT": "mqtt.port",
    "EDGELM_MQTT_USERNAME": "mqtt.username",
    "EDGELM_MQTT_PASSWORD_FILE": "mqtt.password_file",
    "EDGELM_MQTT_CA_FILE": "mqtt.ca_file",
    "EDGELM_MQTT_TLS_CERT": "mqtt.tls_cert",
    "EDGELM_MQTT_TLS_KEY": "mqtt.tls_key",
    "EDGELM_MQTT_BASE_TOPIC": "mqtt.base_topic",
    "EDGELM_MQTT_POOL": "mqtt.pool",
    "EDGELM_HOMEASSISTANT_DISCOVERY": "homeassistant.discovery",
    "EDGELM_HOMEASSISTANT_PREFIX": "homeassistant.prefix",
    "EDGELM_HTTP_LISTEN": "http.listen",
    "EDGELM_HTTP_TOKEN_FILE": "http.token_file",
}
"""Environment variable → the key it overrides. An empty variable counts as unset."""

MACHINE_ID: Final = Path("/etc/machine-id")
CONFIG: Final = Path("/etc/edgelm/edgelm.toml")
"""The service's settings."""
SYSTEM_SOCKET: Final = Path("/run/edgelm.sock")
STORE: Final = Path("/opt/edgelm/bundles")
"""Where a device keeps its bundles."""

_DEVICE: Final = "1 to 64 letters, digits, `.`, `_` and `-`, the first a letter or a digit"
_PREFIX: Final = "a topic that ends in `/`, without `+`, `#` and control characters, and that does not begin with `$`"
_BASE: Final = "topic levels such as `home/edgelm`, without `+`, `#` and control characters, that do not begin with `$`"
Device = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z", description=_DEVICE)]
TOPIC_LEVELS: Final = frozenset(
    ("availability", "claim", "info", "metrics", "pool", "reply", "request", "response", "state", "stream")
)
"""No device and no pool may be called so: its topics, or a broker's rules for them, would cover others."""
Text = Annotated[str, Meta(min_length=1, max_length=256)]
_LEVEL: Final = r"[^/+#\x00-\x1f\x7f-\x9f]+"
BaseTopic = Annotated[str, Meta(pattern=rf"^(?!\$){_LEVEL}(/{_LEVEL})*\Z", max_length=64, description=_BASE)]
_LISTEN: Final = "HOST:PORT, an IPv6 address in brackets, such as 127.0.0.1:8080"
Listen = Annotated[
    str, Meta(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]{1,253}):\d{1,5}\Z", max_length=260, description=_LISTEN)
]
ReplyPrefix = Annotated[str, Meta(pattern=r"^[^$/+#\x00-\x1f][^+#\x00-\x1f]*/\Z", max_length=256, description=_PREFIX)]


def default_bundle() -> Path:
    """The bundle of a checkout; else the current one of this device; else the one installed with the packages."""
    checkout = Path(__file__).resolve().parent.parent / "bundle" / "tinystories"
    installed = Path(sys.prefix) / "share" / "diffusion-llm" / "tinystories"
    return next((path for path in (checkout, STORE / "current") if path.is_dir()), installed)


def socket_candidates() -> tuple[Path, ...]:
    """Where a daemon listens by default: the user's runtime folder, the system's, the temporary one."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    own = (Path(runtime) / "edgelm.sock",) if runtime else ()
    return (*own, SYSTEM_SOCKET, Path(f"/tmp/edgelm-{os.getuid()}.sock"))


def default_socket() -> Path:
    """The first whose folder this user may write to of $XDG_RUNTIME_DIR/edgelm.sock, /run/edgelm.sock and
    /tmp/edgelm-UID.sock.
    """
    candidates = socket_candidates()
    return next((path for path in candidates if os.access(path.parent, os.W_OK | os.X_OK)), candidates[-1])


def default_state() -> Path:
    """The folder that systemd gives the service, or $XDG_STATE_HOME/edgelm, or ~/.local/state/edgelm."""
    given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    home = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(given) if given else Path(home) / "edgelm"


def default_device() -> str:
    """The host's short name, with what MQTT topics cannot carry replaced, and four hex digits of the machine's id.

    Boards of one image share their host name, and brokers admit one client per name.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname().split(".")[0]).strip("-_")[:59] or "edge"
    try:
        machine_id = MACHINE_ID.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):  # a container without one
        return name
    # The id itself is confidential (machine-id(5)): a hash of it, for this use alone, is not.
    return f"{name}-{hashlib.sha256(b'edgelm device ' + machine_id.encode()).hexdigest()[:4]}"


class MqttConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to reach the MQTT broker.

    host: the broker's name or address; without one MQTT is off.
    port: brokers with TLS listen on 8883 as a rule.
    username: login name, if the broker asks for one.
    password_file: file whose content is the password; without it the service takes /etc/edgelm/mqtt.password.
    ca_file: PEM certificates to trust; turns TLS on.
    tls_cert: PEM certificate that shows the broker who this device is, and those that signed it, if it asks for them;
      without it the service takes /etc/edgelm/mqtt.cert.
    tls_key: its private key, without a passphrase; goes with `tls_cert`. The service takes /etc/edgelm/mqtt.key.
    base_topic: what all topics begin with, BASE/DEVICE/….
    pool: a name that devices share: each also takes requests from BASE/pool/NAME/request/generate, of which the broker
      (MQTT 5) gives each to one of them.
    reply_prefixes: a request's `response_topic` must begin with one of these; without any, with BASE/reply/.
    """

    host: Text | None = None
    port: Annotated[int, Meta(ge=1, le=65535)] = 1883
    username: Text | None = None
    password_file: Path | None = None
    ca_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    base_topic: BaseTopic = "edgelm"
    pool: Device | None = None
    reply_prefixes: tuple[ReplyPrefix, ...] = ()


class HomeAssistantConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whether Home Assistant finds this device, through the broker.

    discovery: announce the device and its entities; turned off again, they are removed at the next start.
    prefix: what Home Assistant's own topics begin with.
    """

    discovery: bool = False
    prefix: BaseTopic = "homeassistant"


class HttpConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The HTTP server.

    listen: address and port; without it HTTP is off, unless systemd passes a socket. Beyond this machine (any address
      but a loopback one) only with a token.
    token_file: file whose content each request must bring as `Authorization: Bearer …`; without it the service takes
      /etc/edgelm/http.token.
    """

    listen: Listen | None = None
    token_file: Path | None = None


class Config(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The daemon's settings.

    bundle: folder of the bundle to serve.
    socket: Unix socket to listen on, mode 0660.
    socket_group: group whose members alone may use the socket, beside root and the daemon's own user.
    state: folder of what must outlive the process; with a broker, the journal of accepted requests.
    backend: what runs the model. `ort`: ONNX Runtime on the CPU; `trt`: TensorRT; `auto`: TensorRT once an engine was
      built, else the CPU; `fake`: no model, deterministic scores.
    threads: of the CPU runtime; 0 takes every processor that this process may use.
    queue_size: requests that may wait while others are computed; more are refused as `queue_full`.
    drain_s: seconds that accepted requests get to finish in after SIGTERM.
    device: this device's name in MQTT topics, BASE/DEVICE/….
    mqtt: the broker, in a section of its own.
    homeassistant: discovery by Home Assistant, in a section of its own.
    http: the HTTP server, in a section of its own.
    """

    bundle: Path = field(default_factory=default_bundle)
    socket: Path = field(default_factory=default_socket)
    socket_group: Text | None = None
    state: Path = field(default_factory=default_state)
    backend: Text = "auto"
    threads: Annotated[int, Meta(ge=0, le=256)] = 0
    queue_size: Annotated[int, Meta(ge=1, le=1024)] = 32
    drain_s: Annotated[float, Meta(ge=0, le=600)] = 20.0
    device: Device = field(default_factory=default_device)
    mqtt: MqttConfig = field(default_factory=MqttConfig)
    homeassistant: HomeAssistantConfig = field(default_factory=HomeAssistantConfig)
    http: HttpConfig = field(default_factory=HttpConfig)


def load_config(
    file: Path | None = None, flags: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None
) -> Config:
    """Settings from `file` (or $EDGELM_CONFIG, or none), then the environment, then flags (key → text).

    Relative paths in the file start at the file's folder, all others at the working directory. Raises ConfigError
    naming the file, variable or flag, and the key.
    """
    environ = os.environ if environ is None else environ
    if file is None and environ.get(FILE_VARIABLE):
        file = Path(environ[FILE_VARIABLE])
    config = Config() if file is None else _convert(_read_toml(file), str(file), file.absolute().parent, strict=True)
    ours = {name for name in environ if name.startswith(PREFIX)} - {FILE_VARIABLE, LOG_VARIABLE}
    for variable in sorted(ours):
        if variable not in VARIABLES:
            raise ConfigError(f"unknown environment variable {variable}: known are {', '.join(VARIABLES)}")
        if environ[variable]:
            config = _override(config, variable, VARIABLES[variable], environ[variable])
    for key, text in (flags or {}).items():
        config = _override(config, f"--{key.partition('.')[0]}", key, text)
    if config.mqtt.password_file and not config.mqtt.username:
        raise ConfigError("mqtt.password_file needs mqtt.username: a password is sent only with a user name")
    if (config.mqtt.tls_cert is None) != (config.mqtt.tls_key is None):
        raise ConfigError("mqtt.tls_cert and mqtt.tls_key go together: give both or neither")
    if config.mqtt.tls_cert is not None and config.mqtt.ca_file is None:
        raise ConfigError("mqtt.tls_cert needs mqtt.ca_file, which turns TLS on")
    for key, name in (("device", config.device), ("mqtt.pool", config.mqtt.pool)):
        if name in TOPIC_LEVELS:
            raise ConfigError(
                f"{key} cannot be {name!r}, which is a level of the topics themselves: choose another name"
            )
    if config.mqtt.pool is not None and config.mqtt.host is None:
        raise ConfigError("mqtt.pool needs mqtt.host: a pool's requests come through its broker")
    return config


def settings_file(named: Path | None) -> Path | None:
    """The settings file of a command: the one named, else the service's unless EDGELM_CONFIG names another."""
    return named or (CONFIG if CONFIG.is_file() and FILE_VARIABLE not in os.environ else None)


def log_level(*, default: str) -> int:
    """The level that EDGELM_LOG names. Raises ConfigError."""
    name = os.environ.get(LOG_VARIABLE) or default
    if name not in LEVELS:
        raise ConfigError(f"{LOG_VARIABLE}={name}: choose one of {', '.join(LEVELS)}")
    return int(getattr(logging, name.upper()))


def parse_broker(text: str) -> dict[str, str]:
    """`HOST[:PORT]`, an IPv6 address in brackets, as flags for load_config. Raises ConfigError."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\s]+)(?::(\d+))?", text)
    if match is None:
        raise ConfigError(f"--mqtt {text}: expected HOST or HOST:PORT, such as broker.local:1883")
    host, port = match.groups()
    return {"mqtt.host": host.strip("[]")} | ({"mqtt.port": port} if port else {})


def read_password(mqtt: MqttConfig) -> str | None:
    """The content of the password file without its final line break; None if empty. Raises ConfigError.

    Without such a file, that of the credential `mqtt.password`, which systemd loads for the unit (LoadCredential=).
    """
    return _secret("mqtt.password_file", mqtt.password_file or (credential("mqtt.password") if mqtt.username else None))


def read_token(http: HttpConfig) -> str | None:
    """The token of the HTTP server likewise; the credential is `http.token`. Raises ConfigError."""
    token = _secret("http.token_file", http.token_file or credential("http.token"))
    if http.token_file is not None and token is None:
        raise ConfigError(f"http.token_file {http.token_file} is empty: it must hold the token")
    if token is not None and not re.fullmatch(r"[!-~]{16,512}", token):
        raise ConfigError("the HTTP token must be 16 to 512 printable ASCII characters without spaces")
    return token


def _secret(key: str, file: Path | None) -> str | None:
    """A file's content without its final line break; None if it is empty, or there is no file. Raises ConfigError."""
    if file is None:
        return None
    try:
        return file.read_text("utf-8").rstrip("\r\n") or None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key} {file} cannot be read: {error}") from None


def _read_toml(file: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # JetPack 6
        import tomli as tomllib
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"configuration file {file} cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {file} is not valid TOML: {error}") from None


def _override(config: Config, source: str, key: str, text: str) -> Config:
    """`config` with the value of one variable or flag, checked by itself so that errors name its source."""
    section, _, name = key.rpartition(".")
    given = _convert({section: {name: text}} if section else {name: text}, source, Path.cwd(), strict=False)
    if section:
        changed = msgspec.structs.replace(getattr(config, section), **{name: getattr(getattr(given, section), name)})
        return msgspec.structs.replace(config, **{section: changed})
    return msgspec.structs.replace(config, **{name: getattr(given, name)})


def _convert(settings: dict[str, Any], source: str, base: Path, strict: bool) -> Config:
    try:
        return msgspec.convert(settings, Config, strict=strict, dec_hook=_path_below(base))
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, Config, settings)}") from None


def _path_below(base: Path) -> Callable[[type, object], object]:
    def decode(kind: type, value: object) -> object:
        assert kind is Path
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError("Expected a path")
        return base / Path(value).expanduser()

    return decode
