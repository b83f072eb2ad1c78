"""A publisher that does not wait: QoS 0 messages over a bare socket, as fast as the broker reads them."""

import socket
import struct
import time


def _field(data: bytes) -> bytes:
    return struct.pack("!H", len(data)) + data


def _packet(kind: int, body: bytes) -> bytes:
    length, size = b"", len(body)
    while True:
        size, digit = divmod(size, 128)
        length += bytes([digit | (128 if size else 0)])
        if not size:
            return bytes([kind]) + length + body


def flood(port: int, topic: str, payload: bytes, rate: float, seconds: float) -> int:
    """Publish `payload` so many times a second.  → messages sent"""
    message = _packet(0x30, _field(topic.encode()) + payload)
    sent = 0
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(_packet(0x10, _field(b"MQTT") + b"\x04\x02\x00\x00" + _field(f"flood-{id(sock)}".encode())))
        assert sock.recv(4)[3] == 0, "the broker refuses the connection"
        began_s = time.monotonic()
        while (passed_s := time.monotonic() - began_s) < seconds:
            due = int(passed_s * rate) - sent
            sock.sendall(message * due)
            sent += due
            time.sleep(0.005)
        sock.sendall(b"\xe0\x00")
    return sent
