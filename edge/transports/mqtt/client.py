"""MQTT: the same messages as on the Unix socket, below BASE/DEVICE/, by default edgelm/DEVICE/.

    request/generate[/CLIENT]   in   QoS 1   a JSON object, or plain UTF-8 text, which is the prompt
    request/attachment[/CLIENT]/NAME  in  QoS 1  a PNG or JPEG file, for requests that name it; a refusal goes to
                                     response[/CLIENT]/NAME
    request/cancel[/CLIENT]     in   QoS 0   {"id"}: stops that request; QoS 1 would wait for room in a full window
    request/health[/CLIENT]     in   QoS 0   anything; the answer goes to response[/CLIENT]/health
    response[/CLIENT]/<id>      out  QoS 1   the one terminal answer, unless the request names another topic
    stream[/CLIENT]/<id>        out  QoS 0   snapshots, if the request asks for them and has an id
    availability                out  QoS 1   retained `online` or `offline`, the latter also as last will
    state                       out  QoS 1   retained: what health answers, whenever it changes
    info                        out  QoS 1   retained: version, bundle, limits, JSON schema of the requests
    metrics                     out  QoS 0   retained: counters, every minute

With `mqtt.pool`, the same below BASE/pool/NAME/, for all devices of the pool:

    request/generate[/CLIENT]   in   QoS 1   shared: the broker hands each to one device
    request/cancel[/CLIENT]     in   QoS 0   to all of them
    claim                       both QoS 1   which device answers an id: see edge/delivery/pool.py
    response[/CLIENT]/<id>      out  QoS 1

With `homeassistant.discovery`, also PREFIX/device/edgelm_DEVICE/config (out, retained) and PREFIX/status (in).

Snapshots never share a topic with the answer, because clients such as mosquitto_rr take the first message for it.
With CLIENT, everything about a request stays below CLIENT's topics, which a broker can restrict to that user. Without a
broker the daemon serves its socket and keeps trying to connect. A request is acknowledged once it is in the journal, a
refused one once the refusal is delivered, and none during shutdown.
"""

import logging
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import msgspec
from paho.mqtt.client import MQTTMessage

from edge.config import Config
from edge.delivery.journal import Journal
from edge.delivery.open_requests import Sender
from edge.delivery.outbox import Outbox
from edge.delivery.pool import Claim, Member
from edge.delivery.publisher import Message, MessageTooLargeError
from edge.serving.scheduler import Scheduler
from edge.system.heartbeat import Sign
from edge.transports.attachments import Attachments
from edge.transports.mqtt.homeassistant import Discovery
from edge.transports.mqtt.link import Link
from edge.transports.mqtt.properties import answer_properties, json_properties, partial_properties, sent_with
from edge.transports.mqtt.status import Status
from edge.transports.mqtt.topics import Topics, decode_generate
from shared.errors import RequestError
from shared.messages import GenerateRequest, Partial, decode_cancel, encode, id_of

log = logging.getLogger(__name__)

MAX_CORRELATION_BYTES: Final = 1024
CLOSE_S: Final = 2.0
TAKEN_S: Final = 5.0
"""How long the broker may take to acknowledge a message that is waited for."""
ENDS: Final = ("", "/+")
KINDS: Final = (
    ("generate", ENDS, 1),
    ("attachment", ("/+", "/+/+"), 1),
    ("cancel", ENDS, 0),
    ("health", ENDS, 0),
)
"""Of requests, with what follows in their topics, and the QoS of their subscription."""


@dataclass(frozen=True)
class _Request:
    """A message with the topics, of the device or of a pool, and the client that it belongs to. pooled: our pool's."""

    message: MQTTMessage
    acknowledge: Callable[[], None]
    topics: Topics
    client: str | None
    pooled: bool = False


class MqttTransport:
    """Serves a scheduler through the configured broker. Raises ConfigError for files that cannot be used."""

    def __init__(self, config: Config, scheduler: Scheduler) -> None:
        self._config = config.mqtt
        self._scheduler = scheduler
        self._topics = topics = Topics.of(config)
        self._pool = None if config.mqtt.pool is None else topics.pool(config.mqtt.pool)
        self.attachments = Attachments()
        self._discovery = Discovery(config, topics, self._retain)
        self._link = Link(
            config.mqtt,
            config.device,
            topics=[
                *((topics.own("request", kind) + end, qos) for kind, ends, qos in KINDS for end in ends),
                *self._discovery.subscriptions,
            ],
            pool=[] if self._pool is None else self._pool.subscriptions,
            availability=topics.own("availability"),
            events=self,
        )
        member = None if self._pool is None else Member(config.device, self._pool.own("claim"))
        self._outbox = Outbox(
            Journal(config.state),
            scheduler,
            send=self._send,
            show=self._show,
            member=member,
            redeliver=self._link.renew,
        )
        self._status = Status(scheduler, config.queue_size, publish=self._publish, announce=self._discovery.announce)

    @property
    def broker(self) -> str:
        """Host and port."""
        return self._link.broker

    @property
    def outbox(self) -> Outbox:
        """What holds the journal, which the daemon has once."""
        return self._outbox

    @property
    def signs(self) -> dict[str, Sign]:
        """Of its threads, for the watchdog."""
        return {"mqtt": self._link.heartbeat, "outbox": self._outbox.heartbeat, "status": self._status.heartbeat}

    @property
    def example(self) -> str:
        """A command that requests a story; CLIENT and PASSWORD are to be filled in where the broker has users."""
        login, client = "", None
        if self._config.username is not None:
            login, client = "-u CLIENT -P PASSWORD ", "CLIENT"
        if self._config.ca_file is not None:
            login += f"--cafile {shlex.quote(str(self._config.ca_file))} "
        address = f"-h {shlex.quote(self._config.host or '')} -p {self._config.port} {login}"
        topics = (
            f"-t {self._topics.own('request', 'generate', client)} -e {self._topics.own('response', client, 'try')}"
        )
        return f"mosquitto_rr -V 5 -q 1 {address}{topics} -m 'Once upon a time'"

    def start(self) -> None:
        """Resume what an earlier process left, and connect in the background, for as long as it takes."""
        self._outbox.start()
        self._status.start()
        self._link.start()

    def close(self) -> None:
        """Deliver the last answers, publish `offline` and disconnect; bounded in time."""
        self._status.close()
        self._outbox.close(CLOSE_S)
        self._link.close(b"offline", CLOSE_S)

    def on_connected(self, connection: int, receive_maximum: int) -> None:
        """A connection is up."""
        self._outbox.connected(connection, receive_maximum)
        self._status.publish_all()

    def on_lost(self) -> None:
        """The connection is gone."""
        self._outbox.lost()

    def on_acknowledged(self, number: int, refusal: str | None) -> None:
        """The broker took a message, or refused it."""
        self._outbox.acknowledged(number, refusal)

    def on_message(self, message: MQTTMessage, acknowledge: Callable[[], None]) -> None:
        """Serve a request."""
        try:
            if self._discovery.is_birth(message.topic):
                if message.payload == b"online":
                    self._status.publish_all()
                acknowledge()
                return
            if message.retain:  # would come again at every connection
                log.warning("ignored a retained request on %s", message.topic)
                acknowledge()
                return
            self._serve(message, acknowledge)
        except Exception:  # the connection's thread must go on
            log.exception("a message could not be served")
            acknowledge()

    def _serve(self, message: MQTTMessage, acknowledge: Callable[[], None]) -> None:
        topics, pooled = self._topics, False
        if (pool := topics.pool_of(message.topic)) is not None:
            topics = topics.pool(pool)
            pooled = topics == self._pool
            if not pooled:  # left since: what the broker has given us is answered
                self._link.unsubscribe([topic for topic, _ in topics.subscriptions])
            if message.topic == topics.own("claim"):
                self._hear_claim(message, pooled, acknowledge)
                return
        if (attachment := topics.parse_attachment(message.topic)) is not None:
            client, name = attachment
            self._attach(_Request(message, acknowledge, topics, client), name)
            return
        parsed = topics.parse(message.topic)
        if parsed is None:  # no reply is possible
            self._outbox.replies.limits.drop()
            acknowledge()
            return
        kind, client = parsed
        request = _Request(message, acknowledge, topics, client, pooled)
        if kind == "generate":
            self._generate(request)
        elif kind == "cancel":
            self._cancel(request)
        else:
            sender, error = self._sender(request, topic=None, id="health")
            if error is not None:
                self._outbox.replies.refuse(sender, error, None)
            else:
                self._outbox.replies.reply(sender, lambda: encode(self._scheduler.health()))

    def _hear_claim(self, message: MQTTMessage, pooled: bool, acknowledge: Callable[[], None]) -> None:
        correlation: bytes | None = sent_with(message, "CorrelationData")
        try:
            claim = msgspec.json.decode(message.payload, type=Claim)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            claim = None
        if claim is None or not pooled or message.qos == 0 or len(correlation or b"") > MAX_CORRELATION_BYTES:
            self._outbox.replies.limits.drop()
            acknowledge()
            return
        self._outbox.hear_claim(claim, correlation, acknowledge)

    def _generate(self, incoming: _Request) -> None:
        payload = bytes(incoming.message.payload)
        request: GenerateRequest | None = None
        bad: RequestError | None = None
        try:
            request = decode_generate(payload)
        except RequestError as error:
            bad = error
        topic, id = (None, id_of(payload)) if request is None else (request.response_topic, request.id)
        sender, misplaced = self._sender(incoming, topic=topic, id=id)
        refusal = bad or misplaced
        if request is not None and refusal is None:
            try:
                expiry_s = sent_with(incoming.message, "MessageExpiryInterval")
                self._outbox.accept(sender, request, expiry_s, lambda r: self.attachments.attached(incoming.client, r))
            except RequestError as error:
                refusal = error
            except Exception:  # such as a journal that cannot be read: reported to the sender
                log.exception("a request could not be accepted")
                refusal = RequestError("internal", "the daemon failed on this request; its log has the details")
        if refusal is not None:
            self._outbox.replies.refuse(sender, refusal, id)

    def _attach(self, incoming: _Request, name: str) -> None:
        try:
            takes = self._scheduler.loaded.takes_conditions
            self.attachments.put(incoming.client, name, bytes(incoming.message.payload), takes)
        except RequestError as error:
            sender, _ = self._sender(incoming, topic=None, id=name)
            self._outbox.replies.refuse(sender, error, name)
            return
        incoming.acknowledge()

    def _cancel(self, incoming: _Request) -> None:
        payload = bytes(incoming.message.payload)
        try:
            request = decode_cancel(payload)
        except RequestError as error:
            id = id_of(payload)
            sender, _ = self._sender(incoming, topic=None, id=id)
            self._outbox.replies.refuse(sender, error, id)
            return
        topic: str | None = sent_with(incoming.message, "ResponseTopic")
        self._outbox.cancel(incoming.client, request.id, request.response_topic if topic is None else topic)
        incoming.acknowledge()

    def _sender(self, incoming: _Request, *, topic: str | None, id: str | None) -> tuple[Sender, RequestError | None]:
        """The sender of a message, and what is wrong with its reply topic or correlation data, if anything.

        topic: for the answer, unless the message's properties name one.
        """
        named: str | None = sent_with(incoming.message, "ResponseTopic")
        address, refusal = incoming.topics.address(topic if named is None else named, incoming.client, id)
        correlation: bytes | None = sent_with(incoming.message, "CorrelationData")
        if correlation is not None and len(correlation) > MAX_CORRELATION_BYTES:
            limit = f"correlation data may have {MAX_CORRELATION_BYTES} bytes; this message has {len(correlation)}"
            correlation, refusal = None, RequestError("too_large", limit)
        name = incoming.topics.sender(address) if incoming.client is None else incoming.client
        reliable = incoming.message.qos > 0
        return Sender(name, address, correlation, reliable, incoming.acknowledge, incoming.pooled), refusal

    def _send(self, connection: int, message: Message) -> int | None:
        carried = answer_properties(message.payload, message.correlation)
        return self._link.publish(message.address, message.payload, qos=1, carried=carried, connection=connection)

    def _show(self, client: str, id: str, correlation: bytes | None, partial: Partial) -> None:
        if self._link.ready:  # else a newer one will follow
            topic = self._topics.own("stream", None if "/" in client else client, id)
            carried = partial_properties(partial.seq, correlation)
            with suppress(MessageTooLargeError):
                self._link.publish(topic, encode(partial), qos=0, carried=carried)

    def _retain(self, topic: str, payload: bytes) -> bool:
        return self._link.retain(topic, payload, TAKEN_S)

    def _publish(self, kind: str, payload: bytes, qos: int = 1, retain: bool = False) -> None:
        try:
            self._link.publish(self._topics.own(kind), payload, qos=qos, retain=retain, carried=json_properties())
        except MessageTooLargeError as error:
            log.warning("%s is not published: %s", self._topics.own(kind), error)
