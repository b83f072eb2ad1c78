"""MQTT: the same messages as on the Unix socket, below `edgelm/<device>/`.

    request/generate   in   QoS 1   a JSON object, or plain UTF-8 text, which is the prompt
    request/cancel     in   QoS 0   {"id"}: stops that request; 0, because a full window would hold a QoS 1 back
    request/health     in   QoS 0   anything; the answer goes to response/health
    response/<id>      out  QoS 1   the one terminal answer, unless the request names another topic (…/response: no id)
    stream/<id>        out  QoS 0   snapshots, if the request asks for them and has an id
    availability       out  QoS 1   retained `online` or `offline`, the latter also as last will
    state              out  QoS 1   retained: what health answers, whenever it changes
    info               out  QoS 1   retained: version, bundle, limits, JSON schema of the requests
    metrics            out  QoS 0   counters, every minute

Snapshots never share a topic with the answer, because clients such as mosquitto_rr take the first message for it.
MQTT 5, or 3.1.1 with a broker that refuses it. Without a broker the daemon serves its socket and keeps trying. A
request is acknowledged once it is in the journal, and a refused one once the refusal has arrived.
"""

import logging
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge.config import Config, read_password
from edge.delivery.journal import Journal
from edge.delivery.outbox import Letter, Promises
from edge.serving.scheduler import Scheduler
from edge.system.heartbeat import Heartbeat, Sign
from edge.transports.mqtt.status import Status
from edge.transports.mqtt.topics import (
    Topics,
    answer_properties,
    decode_generate,
    json_properties,
    partial_properties,
    properties,
    sent_with,
)
from shared.errors import ConfigError, RequestError
from shared.messages import MAX_MESSAGE_BYTES, GenerateRequest, Partial, decode_cancel, encode, error_response, id_of

log = logging.getLogger("edgelm")

MAX_PACKET_BYTES: Final = 16 * MAX_MESSAGE_BYTES
"""Above MAX_MESSAGE_BYTES a request is refused by name; above this the broker (MQTT 5) does not even hand it on."""
SESSION_EXPIRY_S: Final = 24 * 3600
"""How long the broker keeps requests for a daemon that is away."""
RECONNECT_S: Final = (1, 30)
FAREWELL_S: Final = 2.0
REFUSED_VERSION: Final = "Unsupported protocol version"


class MqttTransport:
    """Serves a scheduler through the configured broker. Raises ConfigError for files that cannot be used."""

    def __init__(self, config: Config, scheduler: Scheduler) -> None:
        assert config.mqtt.host is not None
        self._config = config.mqtt
        self._host: str = config.mqtt.host
        self._client_id = f"edgelm-{config.device}"
        self._topics = Topics(config.device, config.mqtt.reply_prefixes)
        self._subscriptions = {
            self._topics.own("request/generate"): (1, self._on_generate),
            self._topics.own("request/cancel"): (0, self._on_cancel),
            self._topics.own("request/health"): (0, self._on_health),
        }
        self._password = read_password(config.mqtt)
        self._unreachable = False  # said once, not at every attempt
        self._parted = threading.Event()
        self._connections = 0
        self._heartbeat = Heartbeat()
        self._client = self._make_client(MQTTProtocolVersion.MQTTv5)
        self._scheduler = scheduler
        self._promises = Promises(Journal(config.state), scheduler, self._send, self._show)
        self._status = Status(scheduler, config.queue_size, self._tell)

    @property
    def broker(self) -> str:
        """Host and port."""
        return f"{self._host}:{self._config.port}"

    @property
    def signs(self) -> dict[str, Sign]:
        """Of its threads, for the watchdog."""
        return {"mqtt": self._heartbeat, "outbox": self._promises.heartbeat, "status": self._status.heartbeat}

    @property
    def _modern(self) -> bool:
        return self._client.protocol is MQTTProtocolVersion.MQTTv5

    def start(self) -> None:
        """Take up what an earlier process left, and begin to connect, in the background, for as long as it takes."""
        self._promises.start()
        self._status.start()
        self._connect()

    def close(self) -> None:
        """Hand over the last answers, say `offline`, and part; bounded in time."""
        self._status.close()
        self._promises.close(FAREWELL_S)
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

    def _connect(self) -> None:
        keeps: dict[str, Any] = {}
        if self._modern:
            limits = {"MaximumPacketSize": MAX_PACKET_BYTES, "SessionExpiryInterval": SESSION_EXPIRY_S}
            keeps = {"clean_start": False, "properties": properties(PacketTypes.CONNECT, **limits)}
        self._client.connect_async(self._host, self._config.port, **keeps)
        self._client.loop_start()

    def _make_client(self, protocol: MQTTProtocolVersion) -> Client:
        clean = None if protocol is MQTTProtocolVersion.MQTTv5 else False  # version 5 says so as it connects
        client = Client(
            CallbackAPIVersion.VERSION2, self._client_id, clean_session=clean, protocol=protocol, manual_ack=True
        )
        client.username_pw_set(self._config.username, self._password)
        if self._config.ca_file is not None:
            try:
                client.tls_set(ca_certs=str(self._config.ca_file))
            except OSError as error:
                raise ConfigError(f"mqtt.ca_file {self._config.ca_file} cannot be used: {error}") from None
        client.will_set(self._topics.own("availability"), "offline", qos=1, retain=True)
        client.reconnect_delay_set(*RECONNECT_S)
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._heartbeat.around(self._on_message)
        client.on_publish = self._heartbeat.around(self._on_publish)
        return client

    def _announce(self, state: str) -> Any:
        return self._client.publish(self._topics.own("availability"), state, qos=1, retain=True)

    def _on_connect(
        self, client: Client, userdata: Any, flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason == REFUSED_VERSION and client.protocol is MQTTProtocolVersion.MQTTv5:
            log.info("broker %s refuses MQTT 5; using 3.1.1", self.broker)
            client.disconnect()
            self._client = self._make_client(MQTTProtocolVersion.MQTTv311)
            self._connect()
            self._promises.send_again()
        elif reason.is_failure:
            self._complain(f"broker {self.broker} refuses the connection: {reason}")
        else:
            self._connections += 1
            asked = [(topic, qos) for topic, (qos, _) in self._subscriptions.items()]
            unretained = SubscribeOptions.RETAIN_DO_NOT_SEND
            modern = [(topic, SubscribeOptions(qos=qos, retainHandling=unretained)) for topic, qos in asked]
            client.subscribe(modern if self._modern else asked)

    def _on_subscribe(
        self, client: Client, userdata: Any, mid: int, reasons: list[ReasonCode], properties: Properties | None
    ) -> None:
        # Only now is `online` true: a request sent on seeing it finds the subscription.
        if any(reason.is_failure for reason in reasons):
            refused = next(reason for reason in reasons if reason.is_failure)
            self._complain(f"broker {self.broker} refuses to hand on {self._topics.own('request')}: {refused}")
            return
        self._unreachable = False
        log.info("mqtt connected to %s as %s", self.broker, self._client_id)
        self._announce("online")
        self._status.tell_all()

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
        connection = self._connections

        def acknowledge() -> None:
            if self._connections == connection:  # after that the broker sends it again, perhaps by another number
                client.ack(message.mid, message.qos)

        try:
            if message.retain:  # would be served again at every connect
                log.warning("ignored a retained request on %s", message.topic)
                acknowledge()
            else:
                _, serve = self._subscriptions[message.topic]
                serve(message, acknowledge)
        except Exception:  # paho's thread must live on
            log.exception("a message could not be served")
            acknowledge()

    def _on_generate(self, message: MQTTMessage, acknowledge: Callable[[], None]) -> None:
        payload = bytes(message.payload)
        asked_topic: str | None = sent_with(message, "ResponseTopic")
        correlation: bytes | None = sent_with(message, "CorrelationData")
        request: GenerateRequest | None = None
        refusal: RequestError | None = None
        try:
            request = decode_generate(payload)
            asked_topic = request.response_topic if asked_topic is None else asked_topic
        except RequestError as error:
            refusal = error
        id = id_of(payload) if request is None else request.id
        address, wrong_topic = self._topics.address(asked_topic, id)
        refusal = refusal or wrong_topic
        if request is not None and refusal is None:
            expiry_s = sent_with(message, "MessageExpiryInterval")
            try:
                self._promises.accept(address, correlation, request, expiry_s, acknowledge)
            except Exception:  # a journal that cannot be read, for one: its sender must hear of it
                log.exception("a request could not be accepted")
                refusal = RequestError("internal", "the daemon failed on this request; its log has the details")
        if refusal is not None:
            self._promises.refuse(address, correlation, error_response(refusal, id), acknowledge)

    def _on_cancel(self, message: MQTTMessage, acknowledge: Callable[[], None]) -> None:
        acknowledge()
        payload = bytes(message.payload)
        asked_topic: str | None = sent_with(message, "ResponseTopic")
        try:
            request = decode_cancel(payload)
        except RequestError as error:
            id = id_of(payload)
            address, _ = self._topics.address(asked_topic, id)
            self._promises.refuse(address, sent_with(message, "CorrelationData"), error_response(error, id))
            return
        self._promises.cancel(request.id, request.response_topic if asked_topic is None else asked_topic)

    def _on_health(self, message: MQTTMessage, acknowledge: Callable[[], None]) -> None:
        acknowledge()
        asked_topic, correlation = sent_with(message, "ResponseTopic"), sent_with(message, "CorrelationData")
        address, refusal = self._topics.address(asked_topic, "health")
        if refusal is not None:
            self._promises.refuse(address, correlation, error_response(refusal, None))
            return
        echo = {} if correlation is None else {"CorrelationData": correlation}
        carried = json_properties(**echo) if self._modern else None
        self._client.publish(address, encode(self._scheduler.health()), qos=1, properties=carried)

    def _on_publish(
        self, client: Client, userdata: Any, mid: int, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:  # sent again it would be refused again
            log.warning("broker %s refuses a message of ours: %s", self.broker, reason)
        self._promises.arrived(mid)

    def _send(self, letter: Letter) -> int:
        carried = answer_properties(letter.payload, letter.correlation) if self._modern else None
        return self._client.publish(letter.address, letter.payload, qos=1, properties=carried).mid

    def _show(self, id: str, correlation: bytes | None, partial: Partial) -> None:
        if self._client.is_connected() and not self._client.want_write():  # else a newer one will serve better
            carried = partial_properties(partial.seq, correlation) if self._modern else None
            self._client.publish(self._topics.own("stream", id), encode(partial), properties=carried)

    def _tell(self, kind: str, payload: bytes, qos: int = 1, retain: bool = False) -> None:
        if self._client.is_connected():  # paho would keep what it cannot send, and old news is no use
            carried = json_properties() if self._modern else None
            self._client.publish(self._topics.own(kind), payload, qos, retain, carried)
