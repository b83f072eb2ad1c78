"""Logging in to the broker: user, password and TLS as configured; and a trial login for `edge.doctor`."""

import queue
import ssl
from pathlib import Path
from typing import Final

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edge.config import MqttConfig, read_password
from edge.system.systemd import credential
from shared.errors import ConfigError

LOGIN_S: Final = 5.0
REFUSED_VERSION: Final = "Unsupported protocol version"
HANGS_UP: Final = "it hangs up"


def give_credentials(client: Client, config: MqttConfig, password: str | None) -> None:
    """Set user, password and certificates. Raises ConfigError for a file that cannot be used."""
    client.username_pw_set(config.username, password)
    if config.ca_file is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the broker's certificate and its name
    try:
        context.load_verify_locations(config.ca_file)
    except OSError as error:
        raise ConfigError(f"mqtt.ca_file {config.ca_file} cannot be used: {error}") from None
    if (pair := client_certificate(config)) is not None:
        _show(context, *pair)
    client.tls_set_context(context)


def client_certificate(config: MqttConfig) -> tuple[Path, Path] | None:
    """The files that show the broker who we are: those named, else the service's credentials, if it was given any."""
    if config.tls_cert is not None and config.tls_key is not None:
        return config.tls_cert, config.tls_key
    pair = credential("mqtt.cert"), credential("mqtt.key")
    cert, key = (file if file is not None and file.read_bytes().strip() else None for file in pair)
    if (cert is None) != (key is None):
        raise ConfigError("/etc/edgelm/mqtt.cert and /etc/edgelm/mqtt.key go together: one of them is missing or empty")
    return None if cert is None or key is None else (cert, key)


def _show(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Load a certificate with its key. OpenSSL names neither the file nor what is wrong with it."""
    for name, file in (("mqtt.tls_cert", cert), ("mqtt.tls_key", key)):
        try:
            text = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"{name} {file} cannot be read: {error.strerror}") from None
        if b"ENCRYPTED" in text:
            raise ConfigError(f"{name} {file} is encrypted: a daemon cannot ask for the passphrase")
    try:
        context.load_cert_chain(cert, key, password="")  # else OpenSSL would ask on the terminal
    except ssl.SSLError as error:
        pair = f"mqtt.tls_cert {cert} and mqtt.tls_key {key}"
        raise ConfigError(f"{pair} are no certificate with its private key in PEM: {error.reason or error}") from None


def try_login(config: MqttConfig, client_id: str) -> str | None:
    """Log in and out; client_id: one not in use.  → what is wrong, with its remedy; None if nothing"""
    broker = f"{config.host}:{config.port}"
    try:
        reason = _connack(config, client_id, MQTTProtocolVersion.MQTTv5)
        if reason == REFUSED_VERSION:
            reason = _connack(config, client_id, MQTTProtocolVersion.MQTTv311)
    except ConfigError as error:
        return str(error)
    except ssl.SSLError as error:
        why = getattr(error, "verify_message", None) or error.reason or error
        mend = "mend `mqtt.ca_file`, `mqtt.host` or `mqtt.port`, or `mqtt.tls_cert` where it asks for one"
        return f"TLS with the broker {broker} fails ({why}): {mend}"
    except OSError as error:
        return f"the broker {broker} cannot be reached ({error.strerror or error}): start it, or mend `mqtt.host`"
    if reason == HANGS_UP:
        asks = "is a broker with TLS, set `mqtt.ca_file`"
        if config.ca_file is not None:
            asks = "asks for a client certificate, mend `mqtt.tls_cert` and `mqtt.tls_key`"
        return f"what listens on {broker} hangs up: if it {asks}"
    if reason is not None:
        user = "without a user name" if config.username is None else f"of user {config.username!r}"
        remedy = "mend `mqtt.username` and its password"
        return f"the broker {broker} refuses the login {user} ({reason}): {remedy}"
    return None


def _connack(config: MqttConfig, client_id: str, version: MQTTProtocolVersion) -> str | None:
    """One connection.  → why it was refused, or None. Raises OSError, ConfigError."""
    assert config.host is not None
    answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    client = Client(CallbackAPIVersion.VERSION2, client_id, protocol=version, reconnect_on_failure=False)
    client.connect_timeout = LOGIN_S
    give_credentials(client, config, read_password(config))
    client.on_connect = lambda *args: answer.put(str(args[3]) if args[3].is_failure else None)
    client.on_disconnect = lambda *_: answer.put(HANGS_UP)
    client.connect(config.host, config.port)
    client.loop_start()
    try:
        return answer.get(timeout=LOGIN_S)
    except queue.Empty:
        return "it does not answer"
    finally:
        client.disconnect()
        client.loop_stop()
