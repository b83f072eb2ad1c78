"""The devices of a broker, by what each publishes for everybody: `availability`, `state` and `metrics`.

Whoever may publish on those topics can say what they like: names, sizes and numbers are bounded, and a message that no
device would send is passed over.
"""

import threading
import time
import uuid
from typing import Annotated, Any, Final, get_args

import msgspec
from msgspec import Meta, Struct
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from edge.config import Device as Name
from edge.config import MqttConfig, read_password
from edge.system.locked import Locked
from edge.transports.mqtt.login import LOGIN_S, REFUSED_VERSION, give_credentials, try_login
from edge.transports.mqtt.properties import properties
from shared.errors import DeviceError
from shared.messages import MAX_MESSAGE_BYTES, State

KINDS: Final = ("availability", "state", "metrics")
MAX_DEVICES: Final = 1000
QUIET_S: Final = 0.3
_Short = Annotated[str, Meta(max_length=128)]
_Number = Annotated[float, Meta(ge=0, le=1e12)]


class _State(Struct, tag="health"):
    """What is read of a Health, by this release or another one."""

    state: _Short
    queued: Annotated[int, Meta(ge=0, le=1_000_000)]
    model: _Short
    backend: _Short
    version: _Short
    failure: Annotated[str, Meta(max_length=1100)] | None = None


class _Metrics(Struct, tag="metrics"):
    """What is read of Metrics."""

    tokens_per_s: _Number
    watts: dict[_Short, _Number] = {}
    read_s: _Number | None = None


class Device(Struct, frozen=True, kw_only=True):
    """One device, as far as it was heard. None: not told yet.

    state: that of Health; "stopped" behind an orderly end, "vanished" where the broker lost it. watts: of the board's
    largest rail, which is its input where it has a sensor there. seen_s_ago: seconds since it spoke; if that was before
    we listened, by its own clock.
    """

    device: str
    state: str | None = None
    failure: str | None = None
    bundle: str | None = None
    version: str | None = None
    backend: str | None = None
    queued: int | None = None
    tokens_per_s: float | None = None
    watts: float | None = None
    seen_s_ago: float | None = None

    @property
    def online(self) -> bool:
        """Whether it is there and answers requests, on whatever backend."""
        return self.state in ("idle", "busy", "degraded")


class Fleet:
    """What was heard. base: what topics begin with."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._devices: dict[str, Device] = {}
        self._offline: set[str] = set()
        self._seen_s: dict[str, float] = {}  # since 1970
        self.left_out = False

    def hear(self, topic: str, payload: bytes, *, retained: bool) -> None:
        """Take a message in. retained: it was published before we listened, who knows when."""
        name, _, kind = topic.removeprefix(f"{self._base}/").partition("/")
        if kind not in KINDS or len(payload) > MAX_MESSAGE_BYTES:
            return
        known = self._devices.get(name, Device(device=name))
        if kind == "availability" and not payload:  # somebody cleared it away
            self._devices.pop(name, None)
            return
        seen_s = None if retained else time.time()
        try:
            msgspec.convert(name, Name)
            if kind == "state":
                s = msgspec.json.decode(payload, type=_State)
                known = msgspec.structs.replace(
                    known,
                    state=s.state,
                    failure=s.failure,
                    bundle=s.model,
                    version=s.version,
                    backend=s.backend,
                    queued=s.queued,
                )
            elif kind == "metrics":
                m = msgspec.json.decode(payload, type=_Metrics)
                known = msgspec.structs.replace(
                    known, tokens_per_s=m.tokens_per_s, watts=max(m.watts.values(), default=None)
                )
                seen_s = m.read_s if retained else seen_s
            elif payload == b"offline":
                seen_s = None  # its will, or its last word
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if name not in self._devices and len(self._devices) >= MAX_DEVICES:
            self.left_out = True
            return
        if kind == "availability":
            (self._offline.add if payload == b"offline" else self._offline.discard)(name)
        self._devices[name] = known
        if seen_s is not None:
            self._seen_s[name] = max(seen_s, self._seen_s.get(name, 0.0))

    def devices(self) -> list[Device]:
        """Those heard so far, by name."""
        return [self._now(device) for _, device in sorted(self._devices.items())]

    def _now(self, device: Device) -> Device:
        seen_s, state = self._seen_s.get(device.device), device.state
        if device.device in self._offline:
            state = "stopped" if state == "draining" else "vanished"
        elif state not in (None, *get_args(State)):
            state = "unknown"
        ago = None if seen_s is None else round(max(0.0, time.time() - seen_s), 1)
        return msgspec.structs.replace(device, state=state, seen_s_ago=ago)


class FleetWatch:
    """Listens at the configured broker; a context manager. Raises ConfigError, and DeviceError if that cannot be.

    Connects anew by itself when the connection breaks.
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

    def devices(self) -> list[Device]:
        """Those heard so far, by name."""
        with self._fleet as fleet:
            return fleet.devices()

    @property
    def left_out(self) -> bool:
        """Whether there are more devices than are kept."""
        with self._fleet as fleet:
            return fleet.left_out

    def settle(self) -> list[Device]:
        """Those that the broker knows of, once it has told all that it kept, or has taken too long."""
        give_up_s = time.monotonic() + LOGIN_S
        self._complete.wait(LOGIN_S)
        while time.monotonic() < min(self._heard_s + QUIET_S, give_up_s):
            time.sleep(QUIET_S / 4)
        return self.devices()

    def _make_client(self, version: MQTTProtocolVersion) -> Client:
        client = Client(CallbackAPIVersion.VERSION2, self._id, protocol=version)
        client.connect_timeout = LOGIN_S
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
        # Brokers serve a client's packets one after the other: this is answered behind all that was retained.
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
