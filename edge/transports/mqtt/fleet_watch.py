"""Listens to the devices of a broker."""

import threading
import time
import uuid
from typing import Any, Final

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from edge.config import MqttConfig, read_password
from edge.system.locked import Locked
from edge.transports.mqtt.fleet import KINDS, Fleet, FleetView
from edge.transports.mqtt.login import LOGIN_S, REFUSED_VERSION, give_credentials, try_login
from edge.transports.mqtt.properties import properties
from shared.errors import DeviceError
from shared.messages import MAX_MESSAGE_BYTES

QUIET_S: Final = 0.3
RETRY_S: Final = 5
"""Longest delay before a broker that is lost, or cannot be used, is tried again."""


class FleetWatch:
    """Listens at the configured broker; a context manager. Raises ConfigError, and DeviceError if that cannot be.

    Reconnects by itself.
    """

    def __init__(self, config: MqttConfig) -> None:
        assert config.host is not None
        self.broker = f"{config.host}:{config.port}"
        self.connected = False
        self._config = config
        self._fleet = Locked(Fleet(config.base_topic))
        self._id = f"edgelm-fleet-{uuid.uuid4().hex[:12]}"
        self._answer: str | None = None  # to the first subscription; None: the broker took it
        self._answered = threading.Event()
        self._complete = threading.Event()
        self._heard_s = 0.0

    def __enter__(self) -> "FleetWatch":
        for version in (MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311):
            self._client = self._make_client(version)
            self._answer = "it does not answer"
            try:
                self._client.connect(self._config.host or "", self._config.port, **self._limits(version))
                self._client.loop_start()
                if self._answered.wait(LOGIN_S) and self._answer is None:
                    return self
            except OSError as error:
                self._answer = str(error)
            self.__exit__()
            if self._answer != REFUSED_VERSION:
                break
            self._answered.clear()
        why = try_login(self._config, self._id)  # which knows remedies
        raise DeviceError(why or f"the broker {self.broker} tells nothing of its devices: {self._answer}")

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def view(self) -> FleetView:
        """All that was heard so far."""
        with self._fleet as fleet:
            devices, left_out = fleet.devices(), fleet.left_out
        return FleetView(broker=self.broker, connected=self.connected, left_out=left_out, devices=devices)

    def settle(self) -> FleetView:
        """All devices, once the broker has sent what it retains, or has taken too long."""
        give_up_s = time.monotonic() + LOGIN_S
        self._complete.wait(LOGIN_S)
        while time.monotonic() < min(self._heard_s + QUIET_S, give_up_s):
            time.sleep(QUIET_S / 4)
        return self.view()

    def _make_client(self, version: MQTTProtocolVersion) -> Client:
        client = Client(CallbackAPIVersion.VERSION2, self._id, protocol=version)
        client.connect_timeout = LOGIN_S
        client.reconnect_delay_set(max_delay=RETRY_S)
        give_credentials(client, self._config, read_password(self._config))
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = lambda *_: self._complete.set()
        client.on_message = self._on_message
        return client

    def _limits(self, version: MQTTProtocolVersion) -> dict[str, Any]:
        """The broker (MQTT 5) keeps larger messages to itself."""
        if version is not MQTTProtocolVersion.MQTTv5:
            return {}
        return {"properties": properties(PacketTypes.CONNECT, MaximumPacketSize=2 * MAX_MESSAGE_BYTES)}

    def _on_connect(self, client: Client, userdata: Any, flags: Any, reason: ReasonCode, *_: Any) -> None:
        if reason.is_failure:
            self._answer_with(str(reason))
        else:
            client.subscribe([(f"{self._config.base_topic}/+/{kind}", 0) for kind in KINDS])

    def _on_subscribe(self, client: Client, userdata: Any, mid: int, reasons: list[ReasonCode], *_: Any) -> None:
        state = reasons[KINDS.index("state")]  # without the others the table has fewer columns
        refused = str(state) if state.is_failure else None
        self.connected = refused is None
        self._answer_with(refused)
        self._heard_s = time.monotonic()
        # Brokers serve a client's packets one after the other: this is answered after all retained messages.
        client.unsubscribe(f"{self._config.base_topic}/-/-")

    def _on_disconnect(self, *_: Any) -> None:
        self.connected = False
        self._answer_with("it hangs up")

    def _answer_with(self, refusal: str | None) -> None:
        if not self._answered.is_set():
            self._answer = refusal
            self._answered.set()

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        self._heard_s = time.monotonic()
        with self._fleet as fleet:
            fleet.hear(message.topic, bytes(message.payload), retained=message.retain)
