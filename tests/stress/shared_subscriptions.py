"""What mosquitto does when a member of a shared subscription dies: `python -m tests.stress.shared_subscriptions`.

Two members, of which one never acknowledges and is cut off without a DISCONNECT. Prints a line for each case.
"""

import queue
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes

from edge.transports.mqtt.properties import properties
from shared.errors import run_main
from tests.integration.harness import TIMEOUT_S, Broker, Listener

TOPIC: Final = "pool/request"
DAY_S: Final = 24 * 3600
QUIET_S: Final = 0.5


class Member:
    """Of the shared subscription. expiry_s: of its session. acks: whether it acknowledges. got: the payloads."""

    def __init__(self, port: int, name: str, *, expiry_s: int = DAY_S, acks: bool = True, window: int = 32) -> None:
        self.got: list[str] = []
        self.acks = acks
        session = properties(PacketTypes.CONNECT, SessionExpiryInterval=expiry_s, ReceiveMaximum=window)
        subscribed: queue.Queue[None] = queue.Queue()
        self.client = Client(
            CallbackAPIVersion.VERSION2,
            name,
            protocol=MQTTProtocolVersion.MQTTv5,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        self.client.on_message = self._on_message
        self.client.on_subscribe = lambda *_: subscribed.put(None)
        self.client.connect("127.0.0.1", port, clean_start=False, properties=session)
        self.client.loop_start()
        self.client.subscribe(f"$share/g/{TOPIC}", qos=1)
        subscribed.get(timeout=TIMEOUT_S)
        time.sleep(QUIET_S)

    def die(self) -> None:
        """As a killed process does."""
        connection = self.client.socket()
        assert isinstance(connection, socket.socket)
        connection.shutdown(socket.SHUT_RDWR)
        self.client.loop_stop()
        time.sleep(QUIET_S)

    def _on_message(self, client: Client, userdata: Any, message: Any) -> None:
        self.got.append(message.payload.decode())
        if self.acks:
            client.ack(message.mid, message.qos)


def send(publisher: Listener, first: int, count: int) -> None:
    for i in range(first, first + count):
        publisher.publish(TOPIC, f"r{i}".encode())
    time.sleep(QUIET_S)


def death(port: int, expiry_s: int) -> str:
    """Six requests, the death of the member that got three of them, and six more."""
    publisher, dying, other = (
        Listener(port, "none"),
        Member(port, "a", expiry_s=expiry_s, acks=False),
        Member(port, "b"),
    )
    send(publisher, 0, 6)
    held = set(dying.got)
    dying.die()
    send(publisher, 6, 6)
    given = [name for name in other.got if int(name[1:]) >= 6]
    back = Member(port, "a", expiry_s=expiry_s)
    told = f"of the {len(held)} it held, the other gets {len(held & set(other.got))}; of six more, {len(given)}"
    return f"{told}; on its return it gets {len(held & set(back.got))} and {len(set(back.got) - held)}"


def expiry(port: int) -> str:
    """The session ends while the member is away."""
    publisher, dying, other = Listener(port, "none"), Member(port, "a", expiry_s=2, acks=False), Member(port, "b")
    send(publisher, 0, 6)
    dying.die()
    send(publisher, 6, 6)
    time.sleep(4)
    send(publisher, 12, 4)
    back = Member(port, "a", expiry_s=2)
    before, after = (sum((int(name[1:]) >= 12) == late for name in other.got) for late in (False, True))
    return f"of 12 before the other gets {before}, of 4 after {after}; on its return it gets {len(back.got)}"


def takeover(port: int) -> str:
    """Somebody else logs in under the dead member's name."""
    publisher, dying, _ = Listener(port, "none"), Member(port, "a", acks=False), Member(port, "b")
    send(publisher, 0, 6)
    dying.die()
    send(publisher, 6, 6)
    return f"of the 6 for the dead one, gets {len(Member(port, 'a').got)}"


def window(port: int) -> str:
    """A member that acknowledges nothing, with a Receive Maximum of 4."""
    publisher, slow, other = Listener(port, "none"), Member(port, "a", acks=False, window=4), Member(port, "b")
    send(publisher, 0, 40)
    return f"of 40 it has {len(slow.got)}, the other {len(other.got)}: the rest wait for the slow one"


def limit(port: int) -> str:
    """More requests than the broker keeps for a client, max_queued_messages, by default 1,000."""
    publisher, away, other = Listener(port, "none"), Member(port, "a"), Member(port, "b")
    away.die()
    send(publisher, 0, 3000)
    back = Member(port, "a")
    time.sleep(2)
    lost = 3000 - len({*other.got, *back.got})
    return f"of 3000 the other gets {len(set(other.got))}, it on its return {len(set(back.got))}, nobody {lost}"


CASES: Final[dict[str, Callable[[int], str]]] = {
    "session of a day, killed": lambda port: death(port, DAY_S),
    "session that ends with the connection, killed": lambda port: death(port, 0),
    "session that expires while it is away": expiry,
    "another client of the dead one's name": takeover,
    "full window": window,
    "full queue": limit,
}


def main() -> int:
    """Print what happens in each case."""
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            broker = Broker(Path(folder)).start()
            try:
                print(f"{name}: {case(broker.port)}", flush=True)
            finally:
                broker.stop()
    return 0


if __name__ == "__main__":
    run_main(main)
