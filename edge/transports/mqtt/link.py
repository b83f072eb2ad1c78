"""The connection to the broker: one paho client per connection, and a thread that opens the next when one ends.

A new client has no state of the old one: messages that were in flight are sent again by the outbox, which counts tries,
and no acknowledgement of one connection is taken for another's. MQTT 5, or 3.1.1 if the broker refuses it. The session
at the broker outlives all connections.
"""

import ipaddress
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge.config import MqttConfig, read_password
from edge.delivery.publisher import MessageTooLargeError
from edge.system.heartbeat import Heartbeat
from edge.transports.mqtt.login import REFUSED_VERSION, give_credentials
from edge.transports.mqtt.properties import properties
from shared.messages import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

MAX_PACKET_BYTES: Final = 4 * MAX_MESSAGE_BYTES
"""Above MAX_MESSAGE_BYTES a request is refused by name; above this the broker (MQTT 5) does not deliver it."""
RECEIVE_MAXIMUM: Final = 32
"""QoS 1 messages that the broker delivers before the first of them is acknowledged."""
SESSION_EXPIRY_S: Final = 24 * 3600
"""How long the broker keeps requests for a daemon that is not connected."""
RECONNECT_S: Final = (1.0, 30.0)
"""Delay between attempts: the first, and the longest."""
TAKEN_OVER_S: Final = (60.0, 3600.0)
"""The same after another client logged in under our name."""
LASTED_S: Final = 5.0
MAX_SHORT_LIVED: Final = 3
"""Connections in a row that broke within LASTED_S and could be made again at once: another client has our name. MQTT
3.1.1, and mosquitto 2.0 in either version, do not report it.
"""
HEADER_BYTES: Final = 16
"""Of a PUBLISH packet, without topic, properties and payload."""
TAKEN_OVER: Final = "Session taken over"
UNSPECIFIED: Final = "Unspecified error"
BROKEN: Final = "the connection broke"


class Events(Protocol):
    """What a link reports, from its own threads."""

    def on_connected(self, connection: int, receive_maximum: int) -> None: ...
    def on_lost(self) -> None: ...
    def on_message(self, message: MQTTMessage, acknowledge: Callable[[], None]) -> None: ...
    def on_acknowledged(self, number: int, refusal: str | None) -> None: ...


class Link:
    """Keeps a connection to the configured broker. Raises ConfigError for files that cannot be used.

    topics: what to subscribe to, with the QoS. pool: the same, where the broker has shared subscriptions. availability:
    the topic of the last will.
    """

    def __init__(
        self,
        config: MqttConfig,
        device: str,
        *,
        topics: list[tuple[str, int]],
        pool: list[tuple[str, int]],
        availability: str,
        events: Events,
    ) -> None:
        assert config.host is not None
        self.broker = f"{config.host}:{config.port}"
        self.client_id = f"edgelm-{device}"
        self.heartbeat = Heartbeat()
        self._config = config
        self._host = config.host
        self._password = read_password(config)
        self._topics = topics
        self._pool = pool
        self._pool_is_off = False
        self._availability = availability
        self._events = events
        self._version = MQTTProtocolVersion.MQTTv5
        self._connection = 0
        self._client: Client | None = None  # while it is subscribed
        self._max_packet_bytes = sys.maxsize
        self._receive_maximum = 0
        self._wait_s = 0.0
        self._short_lived = 0
        self._takeovers = 0
        self._silenced = False  # a failure is reported once, not at every attempt
        self._ending: str | None = None  # why the present connection ended
        self._over = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)
        self._make_client()  # a bad certificate file is reported now

    @property
    def modern(self) -> bool:
        """Whether it speaks MQTT 5, which has properties."""
        return self._version is MQTTProtocolVersion.MQTTv5

    @property
    def ready(self) -> bool:
        """Whether a message would be sent at once."""
        client = self._client
        return client is not None and not client.want_write()

    def start(self) -> None:
        """Begin to connect, in the background, for as long as it takes."""
        if self._password and self._config.ca_file is None and not _is_loopback(self._host):
            log.warning("the MQTT password goes to %s unencrypted: set mqtt.ca_file, which turns TLS on", self.broker)
        self._thread.start()

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int,
        retain: bool = False,
        carried: Properties | None = None,
        connection: int | None = None,
    ) -> int | None:
        """Send a message; connection: on this one or not at all.  → its number; None without a connection

        carried: properties, left out in MQTT 3.1.1. Raises MessageTooLargeError above the broker's packet size.
        """
        client = self._client
        if client is None or connection not in (None, self._connection):
            return None
        if not self.modern:
            carried = None
        size = HEADER_BYTES + len(topic.encode()) + len(payload) + (len(carried.pack()) if carried else 1)  # type: ignore[no-untyped-call]
        if size > self._max_packet_bytes:
            raise MessageTooLargeError(f"{size} bytes, and broker {self.broker} takes {self._max_packet_bytes}")
        sent = client.publish(topic, payload, qos, retain, carried)
        return sent.mid if sent.rc in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN) else None

    def retain(self, topic: str, payload: bytes, timeout_s: float) -> bool:
        """Publish a retained message and wait for the broker.  → whether it was acknowledged in time"""
        client = self._client
        if client is None:
            return False
        try:
            sent = client.publish(topic, payload, qos=1, retain=True)
            sent.wait_for_publish(timeout_s)
            return sent.is_published()
        except (RuntimeError, ValueError) as error:  # the connection broke just now
            log.warning("%s", error)
            return False

    def unsubscribe(self, topics: list[str]) -> None:
        """Have the broker hand on no more of them."""
        client = self._client
        if client is not None:
            client.unsubscribe(topics)

    def renew(self) -> None:
        """Have the broker deliver again what was not acknowledged: it does on a new connection."""
        log.info("connecting anew, for the requests that the broker was left with")
        client = self._client
        if client is not None:
            client.disconnect()

    def close(self, last_availability: bytes, timeout_s: float) -> None:
        """Publish a last availability and disconnect; the broker keeps undelivered messages."""
        self._stopping.set()
        client = self._client
        if client is not None:
            self.retain(self._availability, last_availability, timeout_s)  # or else the last will follows
            client.disconnect()
        else:
            self._over.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._ending = None
            self._over.clear()
            began_s = time.monotonic()
            connected = False
            try:
                connected = self._connect_once()
            except (OSError, ValueError) as error:
                self._complain(f"broker {self.broker} cannot be reached: {getattr(error, 'strerror', None) or error}")
            except Exception:  # the thread must go on
                log.exception("the connection to broker %s failed", self.broker)
            self._stopping.wait(self._pause_s(connected, time.monotonic() - began_s))

    def _connect_once(self) -> bool:
        """One connection, from opening to end.  → whether it was subscribed"""
        client = self._make_client()
        limits: dict[str, Any] = {}
        if self.modern:
            values = {"MaximumPacketSize": MAX_PACKET_BYTES, "ReceiveMaximum": RECEIVE_MAXIMUM}
            session = properties(PacketTypes.CONNECT, SessionExpiryInterval=SESSION_EXPIRY_S, **values)
            limits = {"clean_start": False, "properties": session}
        client.connect(self._host, self._config.port, **limits)
        client.loop_start()
        if not self._stopping.is_set():
            self._over.wait()
        connected, self._client = self._client is not None, None
        client.disconnect()
        client.loop_stop()  # no callback of this connection runs after this
        if connected:
            self._events.on_lost()
        return connected

    def _pause_s(self, connected: bool, lasted_s: float) -> float:
        """Delay before the next attempt. Reports another client of our name."""
        if self._ending == REFUSED_VERSION:
            return 0.0
        short = connected and lasted_s < LASTED_S and self._ending == BROKEN
        self._short_lived = self._short_lived + 1 if short else 0
        if lasted_s > TAKEN_OVER_S[1]:
            self._takeovers = 0
        if self._ending == TAKEN_OVER or self._short_lived >= (1 if self._takeovers else MAX_SHORT_LIVED):
            pause_s = min(TAKEN_OVER_S[0] * (1 << min(self._takeovers, 16)), TAKEN_OVER_S[1])
            self._takeovers += 1
            log.error(
                "another client also logs in to broker %s as %s, and each login ends the other's connection: give each "
                "device a `device` name of its own; trying again in %.0f s",
                self.broker,
                self.client_id,
                pause_s,
            )
            return pause_s
        self._wait_s = RECONNECT_S[0] if connected else min(max(2 * self._wait_s, RECONNECT_S[0]), RECONNECT_S[1])
        return self._wait_s

    def _make_client(self) -> Client:
        clean = None if self.modern else False  # version 5 says so as it connects
        client = Client(
            CallbackAPIVersion.VERSION2,
            self.client_id,
            clean_session=clean,
            protocol=self._version,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        give_credentials(client, self._config, self._password)
        client.will_set(self._availability, "offline", qos=1, retain=True)
        # The second of two small packets would wait for the broker's acknowledgement of the first, 40 ms.
        client.on_socket_open = lambda *args: args[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_message = self.heartbeat.around(self._on_message)
        client.on_publish = self.heartbeat.around(self._on_publish)
        return client

    def _on_connect(
        self, client: Client, userdata: Any, flags: ConnectFlags, reason: ReasonCode, carried: Properties | None
    ) -> None:
        if reason == REFUSED_VERSION and self.modern:
            log.info("broker %s refuses MQTT 5; using 3.1.1", self.broker)
            self._version = MQTTProtocolVersion.MQTTv311
            self._end(REFUSED_VERSION)
        elif reason.is_failure:
            self._complain(f"broker {self.broker} refuses the connection: {reason}")
            self._end(str(reason))
        else:
            self._max_packet_bytes = getattr(carried, "MaximumPacketSize", sys.maxsize)
            self._receive_maximum = getattr(carried, "ReceiveMaximum", 0xFFFF)
            unretained = SubscribeOptions.RETAIN_DO_NOT_SEND
            topics = self._wanted(carried)
            modern = [(topic, SubscribeOptions(qos=qos, retainHandling=unretained)) for topic, qos in topics]
            client.subscribe(modern if self.modern else topics)

    def _wanted(self, carried: Properties | None) -> list[tuple[str, int]]:
        if not self._pool or (self.modern and getattr(carried, "SharedSubscriptionAvailable", True)):
            return [*self._topics, *self._pool]
        if not self._pool_is_off:
            self._pool_is_off = True
            why = "does not allow" if self.modern else "speaks MQTT 3.1.1 alone, which lacks"
            log.error(
                "broker %s %s shared subscriptions: this device takes no requests of `mqtt.pool`, only its own",
                self.broker,
                why,
            )
        return self._topics

    def _on_subscribe(
        self, client: Client, userdata: Any, mid: int, reasons: list[ReasonCode], carried: Properties | None
    ) -> None:
        # Only now: a client that sees `online` may rely on the subscription.
        topics = (topic for topic, _ in (*self._topics, *self._pool))
        refused = next(((t, reason) for t, reason in zip(topics, reasons, strict=False) if reason.is_failure), None)
        if refused is not None:
            self._complain(f"broker {self.broker} refuses to hand on {refused[0]}: {refused[1]}")
            self._end(str(refused[1]))
        elif not self._stopping.is_set():
            self._silenced = False
            log.info("mqtt connected to %s as %s", self.broker, self.client_id)
            client.publish(self._availability, "online", qos=1, retain=True)
            self._connection += 1
            self._client = client
            self._events.on_connected(self._connection, self._receive_maximum)

    def _on_disconnect(
        self, client: Client, userdata: Any, flags: DisconnectFlags, reason: ReasonCode, carried: Properties | None
    ) -> None:
        why = BROKEN if reason == UNSPECIFIED else str(reason)
        if reason.is_failure and self._ending is None and reason != TAKEN_OVER:
            self._complain(f"broker {self.broker} is lost: {why}")
        self._end(why)

    def _end(self, why: str) -> None:
        self._ending = self._ending or why  # the first reason is the cause
        self._over.set()

    def _complain(self, sentence: str) -> None:
        if not self._silenced:
            log.warning("%s; retrying until it works", sentence)
        self._silenced = True

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        if not self._stopping.is_set():  # else the broker keeps it for the next daemon
            mid, qos = message.mid, message.qos  # not the message, which may have a picture
            self._events.on_message(message, lambda: _acknowledge(client, mid, qos))

    def _on_publish(
        self, client: Client, userdata: Any, mid: int, reason: ReasonCode, carried: Properties | None
    ) -> None:
        self._events.on_acknowledged(mid, str(reason) if reason.is_failure else None)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _acknowledge(client: Client, mid: int, qos: int) -> None:
    client.ack(mid, qos)
