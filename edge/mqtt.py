"""MQTT: the same messages as on the Unix socket, below `edgelm/<device>/`.

    request/generate   in   QoS 1   a JSON object, or plain UTF-8 text, which is the prompt
    response/<id>      out  QoS 1   the one terminal answer, unless the request names another topic (…/response: no id)
    stream/<id>        out  QoS 0   snapshots, if the request asks for them and has an id
    availability       out  QoS 1   retained `online` or `offline`, the latter also as last will

Snapshots never share a topic with the answer, because clients such as mosquitto_rr take the first message for it.
MQTT 5, or 3.1.1 with a broker that refuses it. Without a broker the daemon serves its socket and keeps trying.
"""

import logging
import re
import sys
import threading
from dataclasses import dataclass
from typing import Any, Final

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge.config import Config, read_password
from edge.scheduler import Scheduler
from shared.errors import ConfigError, RequestError
from shared.messages import (
    MAX_MESSAGE_BYTES,
    GenerateRequest,
    Partial,
    Reply,
    decode_request,
    encode,
    error_response,
    id_of,
)

log = logging.getLogger("edgelm")

MAX_PACKET_BYTES: Final = 16 * MAX_MESSAGE_BYTES
"""Above MAX_MESSAGE_BYTES a request is refused by name; above this the broker (MQTT 5) does not even hand it on."""
RECONNECT_S: Final = (1, 30)
FAREWELL_S: Final = 2.0
MAX_TOPIC: Final = 256
MAX_LEVELS: Final = 16
REFUSED_VERSION: Final = "Unsupported protocol version"

_NONCHARACTERS: Final = "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
UNSENDABLE: Final = re.compile(f"[+#\x00-\x1f\x7f-\x9f\ufdd0-\ufdef{_NONCHARACTERS}]")
"""Wildcards, and characters at which a broker may drop the connection: one bad topic would then end every answer."""


@dataclass(frozen=True)
class _Address:
    """Where the replies to one request go. stream: None when it gets no snapshots."""

    response: str
    stream: str | None
    correlation: bytes | None


class MqttTransport:
    """Serves a scheduler through the configured broker. Raises ConfigError for files that cannot be read."""

    def __init__(self, config: Config, scheduler: Scheduler) -> None:
        assert config.mqtt.host is not None
        self._config = config.mqtt
        self._host: str = config.mqtt.host
        self._scheduler = scheduler
        self._client_id = f"edgelm-{config.device}"
        self._base = f"edgelm/{config.device}"
        self._password = read_password(config.mqtt)
        self._unreachable = False  # said once, not at every attempt
        self._parted = threading.Event()
        self._client = self._make_client(MQTTProtocolVersion.MQTTv5)

    @property
    def broker(self) -> str:
        """Host and port."""
        return f"{self._host}:{self._config.port}"

    def start(self) -> None:
        """Begin to connect, in the background, for as long as it takes."""
        modern = self._client.protocol is MQTTProtocolVersion.MQTTv5
        limit = _properties(PacketTypes.CONNECT, MaximumPacketSize=MAX_PACKET_BYTES) if modern else None
        self._client.connect_async(self._host, self._config.port, properties=limit)
        self._client.loop_start()

    def close(self) -> None:
        """Hand over the last answers, say `offline`, and part; bounded in time."""
        client = self._client
        connected = client.is_connected()
        if connected:
            try:
                self._announce("offline").wait_for_publish(FAREWELL_S)
            except RuntimeError as error:  # the connection broke just now: the last will says it for us
                log.warning("%s", error)
        self._parted.clear()
        client.disconnect()
        if connected:
            self._parted.wait(FAREWELL_S)

    def _make_client(self, protocol: MQTTProtocolVersion) -> Client:
        client = Client(CallbackAPIVersion.VERSION2, client_id=self._client_id, protocol=protocol)
        client.username_pw_set(self._config.username, self._password)
        if self._config.ca_file is not None:
            try:
                client.tls_set(ca_certs=str(self._config.ca_file))
            except OSError as error:
                raise ConfigError(f"mqtt.ca_file {self._config.ca_file} cannot be used: {error}") from None
        client.will_set(f"{self._base}/availability", "offline", qos=1, retain=True)
        client.reconnect_delay_set(*RECONNECT_S)
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        return client

    def _announce(self, state: str) -> Any:
        return self._client.publish(f"{self._base}/availability", state, qos=1, retain=True)

    def _on_connect(
        self, client: Client, userdata: Any, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason == REFUSED_VERSION and client.protocol is MQTTProtocolVersion.MQTTv5:
            log.info("broker %s refuses MQTT 5; using 3.1.1", self.broker)
            client.disconnect()
            self._client = self._make_client(MQTTProtocolVersion.MQTTv311)
            self.start()
        elif reason.is_failure:
            self._complain(f"broker {self.broker} refuses the connection: {reason}")
        else:
            topic = f"{self._base}/request/generate"
            if client.protocol is MQTTProtocolVersion.MQTTv5:
                options = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
                client.subscribe(topic, options=options)
            else:
                client.subscribe(topic, qos=1)

    def _on_subscribe(
        self, client: Client, userdata: Any, mid: int, reasons: list[ReasonCode], properties: Properties | None
    ) -> None:
        # Only now is `online` true: a request sent on seeing it finds the subscription.
        if any(reason.is_failure for reason in reasons):
            self._complain(f"broker {self.broker} refuses to hand on {self._base}/request/generate: {reasons[0]}")
            return
        self._unreachable = False
        log.info("mqtt connected to %s as %s", self.broker, self._client_id)
        self._announce("online")

    def _on_connect_fail(self, client: Client, userdata: Any) -> None:
        # paho calls this while it handles the error, and has no other way to tell which.
        self._complain(f"broker {self.broker} cannot be reached: {sys.exc_info()[1]}")

    def _on_disconnect(
        self, client: Client, userdata: Any, flags: DisconnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self._parted.set()
        if reason.is_failure:
            self._complain(f"broker {self.broker} is lost: {reason}")

    def _complain(self, sentence: str) -> None:
        if not self._unreachable:
            log.warning("%s; retrying until it works", sentence)
        self._unreachable = True

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        try:
            if message.retain:  # would be served again at every connect
                log.warning("ignored a retained request on %s", message.topic)
            else:
                self._serve(message)
        except Exception:  # paho's thread must live on
            log.exception("a message could not be served")

    def _serve(self, message: MQTTMessage) -> None:
        asked_topic: str | None = getattr(message.properties, "ResponseTopic", None)
        correlation: bytes | None = getattr(message.properties, "CorrelationData", None)
        payload = bytes(message.payload)
        request: GenerateRequest | None = None
        refusal: RequestError | None = None
        try:
            request = _decode(payload)
            asked_topic = request.response_topic if asked_topic is None else asked_topic
        except RequestError as error:
            refusal = error
        id = id_of(payload) if request is None else request.id
        response = self._own_topic("response", id)
        if asked_topic is not None and self._may_publish(asked_topic):
            response = asked_topic
        elif asked_topic is not None and refusal is None:
            below = ", ".join(self._config.reply_prefixes)
            refusal = RequestError("bad_reply_topic", f"answers go to topics below {below}, not to {asked_topic!r}")
        stream = None if id is None else self._own_topic("stream", id)
        address = _Address(response, stream, correlation)
        if request is None or refusal is not None:
            assert refusal is not None
            self._reply(address, error_response(refusal, id))
        else:
            self._scheduler.submit(request, lambda reply: self._reply(address, reply))

    def _own_topic(self, kind: str, id: str | None) -> str:
        return f"{self._base}/{kind}" if id is None or UNSENDABLE.search(id) else f"{self._base}/{kind}/{id}"

    def _may_publish(self, topic: str) -> bool:
        """Whether a client may direct answers there: otherwise anyone could publish with the daemon's rights."""
        levels = topic.split("/")
        own = topic.startswith(f"{self._base}/")
        spoofs = levels[2:3] != ["response"] if own else levels[2:3] in (["request"], ["availability"])
        return (
            topic.startswith(self._config.reply_prefixes)
            and not spoofs
            and len(topic) <= MAX_TOPIC
            and len(levels) <= MAX_LEVELS
            and UNSENDABLE.search(topic) is None
        )

    def _reply(self, address: _Address, reply: Reply) -> None:
        partial = isinstance(reply, Partial)
        topic = address.stream if partial else address.response
        if topic is None:
            return
        properties = None
        if self._client.protocol is MQTTProtocolVersion.MQTTv5:
            echo = {} if address.correlation is None else {"CorrelationData": address.correlation}
            properties = _properties(
                PacketTypes.PUBLISH, ContentType="application/json", PayloadFormatIndicator=1, **echo
            )
        self._client.publish(topic, encode(reply), qos=0 if partial else 1, properties=properties)


def _properties(packet: int, **values: Any) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


def _decode(payload: bytes) -> GenerateRequest:
    """A JSON object, or plain text as the prompt. Raises RequestError."""
    if payload.lstrip().startswith(b"{"):
        return decode_request(payload)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise RequestError("too_large", f"a message may have {MAX_MESSAGE_BYTES} bytes; this one has {len(payload)}")
    if not payload:
        raise RequestError("bad_request", 'an empty message asks for nothing; send {"prompt": ""} for a free story')
    try:
        return GenerateRequest(prompt=payload.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError("bad_request", f"the prompt is not UTF-8: {error.reason} at byte {error.start}") from None
