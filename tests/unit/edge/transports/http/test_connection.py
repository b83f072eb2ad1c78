"""What one connection may take of time and memory: a real server in this process, with its patience cut short."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from edge.serving.scheduler import Scheduler
from edge.transports.http import connection, places
from edge.transports.http.attaching import MAX_UPLOADS, MAX_UPLOADS_OF_UNIT
from edge.transports.http.server import HttpServer

TIMEOUT_S = 20.0
CHUNKED = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def dial(server: HttpServer) -> Iterator[Callable[..., socket.socket]]:
    """Connect from an address of this machine; all connections are closed at the end."""
    dialled: list[socket.socket] = []

    def connect(source: str = "127.0.0.1", receive_bytes: int | None = None) -> socket.socket:
        sock = socket.socket()
        dialled.append(sock)
        sock.settimeout(TIMEOUT_S)
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.bind((source, 0))
        sock.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        return sock

    yield connect
    for sock in dialled:
        sock.close()


def test_connection_sends_small_pieces_at_once(server: HttpServer, dial: Callable[..., socket.socket]) -> None:
    """Else the kernel keeps the second of two for the client's acknowledgement: 40 ms for a head and its body."""
    sock = dial()
    sock.sendall(GET)
    assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
    (served,) = server.places
    accepted = served._transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def read_all(sock: socket.socket) -> bytes:
    """Everything until the server hangs up."""
    data = bytearray()
    while piece := sock.recv(65536):
        data += piece
    return bytes(data)


def head_of(answer: bytes) -> tuple[int, str]:
    """Status, and the code of the error that it is, of an answer with nothing after it."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


@pytest.mark.parametrize(
    "half", [GET[:20], b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"]
)
def test_connection_a_half_request_is_ended_however_it_trickles(
    dial: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch, half: bytes
) -> None:
    monkeypatch.setattr(connection, "REQUEST_S", 0.4)
    sock = dial()
    began_s = time.monotonic()
    for byte in half:
        sock.sendall(bytes([byte]))
        time.sleep(0.004)
    assert head_of(read_all(sock)) == (408, "too_slow")
    assert time.monotonic() - began_s < 10


def test_connection_idle_is_closed(dial: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IDLE_S", 0.2)
    fresh, used = dial(), dial()
    used.sendall(GET)
    assert read_all(used).startswith(b"HTTP/1.1 200")
    assert read_all(fresh) == b""


def test_connection_that_reads_nothing_is_cut_off_and_bounded(
    dial: Callable[..., socket.socket], server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALL_S", 0.3)
    sock = dial(receive_bytes=4096)
    sock.setblocking(False)
    until(lambda: len(server.places) == 1)
    sent = most = 0
    give_up_s = time.monotonic() + TIMEOUT_S
    while len(server.places) and time.monotonic() < give_up_s:
        try:
            sent += sock.send(GET * 100)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            break
        most = max([most, *(guest.unsent for guest in server.places)])
    assert sent > 100_000 and 0 < most < 2 * connection.MAX_UNREAD_BYTES
    until(lambda: len(server.places) == 0)


def test_connection_that_reads_late_gets_every_answer(dial: Callable[..., socket.socket]) -> None:
    sock = dial(receive_bytes=4096)
    sock.sendall(GET * 1000 + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    time.sleep(0.3)
    assert read_all(sock).count(b"HTTP/1.1 200") == 1001


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"rubbish\r\n\r\n", 400, "bad_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "bad_request"),  # no Host
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "bad_request"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000, 431, "headers_too_large"),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n", 413, "too_large"),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "bad_request"),
        (
            CHUNKED + b"8000\r\n" + b"a" * 0x8000 + b"\r\n8001\r\n" + b"a" * 0x8001,
            413,
            "too_large",
        ),
        (CHUNKED + b"zz\r\n", 400, "bad_request"),
    ],
)
def test_connection_what_is_no_request_is_refused_and_closed(
    dial: Callable[..., socket.socket], request_: bytes, status: int, code: str
) -> None:
    sock = dial()
    sock.sendall(request_)
    assert head_of(read_all(sock)) == (status, code)


@pytest.mark.parametrize("half", [GET[:20], GET[:-1], CHUNKED + b"5\r\nab"])
def test_connection_half_a_request_that_ends_is_refused(dial: Callable[..., socket.socket], half: bytes) -> None:
    sock = dial()
    sock.sendall(half)
    sock.shutdown(socket.SHUT_WR)
    assert head_of(read_all(sock)) == (400, "bad_request")


def test_connection_expect_continue_is_answered_before_the_body(dial: Callable[..., socket.socket]) -> None:
    body = b'{"prompt": "a", "max_tokens": 1}'
    sock = dial()
    sock.sendall(POST + b"Content-Length: %d\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n" % len(body))
    assert sock.recv(100).startswith(b"HTTP/1.1 100")
    sock.sendall(body)
    assert read_all(sock).startswith(b"HTTP/1.1 200")


def test_connection_hanging_up_cancels(dial: Callable[..., socket.socket], scheduler: Scheduler) -> None:
    body = b'{"prompt": "a", "decode": "canvas", "steps": 200}'
    sock = dial()
    sock.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    until(lambda: scheduler.busy)
    sock.close()
    until(lambda: scheduler.metrics().answered.get("cancelled") == 1)
    assert not scheduler.busy


def test_connection_places_are_shared_among_addresses(
    dial: Callable[..., socket.socket], server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "ADDRESS_CONNECTIONS", 3)
    monkeypatch.setattr(places, "MAX_CONNECTIONS", 5)
    greedy = [dial() for _ in range(4)]
    assert greedy[0].recv(1) == b""  # idle for longest
    others = [dial(f"127.0.0.{n}") for n in range(2, 5)]
    assert greedy[1].recv(1) == b""  # of the address that holds most
    for sock in (*greedy[2:], *others):
        sock.sendall(GET)
        assert sock.recv(15).startswith(b"HTTP/1.1 200")
    assert len(server.places) == 5


def test_connection_beyond_busy_places_is_told_so(
    dial: Callable[..., socket.socket], scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "ADDRESS_CONNECTIONS", 1)
    body = b'{"prompt": "a", "decode": "canvas", "steps": 200}'
    busy = dial()
    busy.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    until(lambda: scheduler.busy)
    late = dial()
    late.sendall(GET)
    assert head_of(read_all(late)) == (429, "queue_full")


def test_connection_refusals_of_one_address_are_slowed_and_of_another_not(
    dial: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "BURST", 5)
    bad = b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n"
    flood = dial()
    began_s = time.monotonic()  # before the flood is sent: the server may refuse its first at once
    flood.sendall((bad + b"\r\n") * 14 + bad + b"Connection: close\r\n\r\n")
    other = dial("127.0.0.2")
    other.sendall(bad + b"Connection: close\r\n\r\n")
    assert head_of(read_all(other)) == (404, "not_found")
    quick_s = time.monotonic() - began_s
    assert read_all(flood).count(b"HTTP/1.1 404") == 15
    slow_s = time.monotonic() - began_s
    assert slow_s >= 10 / places.RATE > 0 and quick_s < slow_s


def test_connection_the_watchdogs_sign_moves_with_the_loop(server: HttpServer) -> None:
    sign = server.signs["http"]
    assert not sign()[1]
    until(lambda: sign()[0] > 2)
    held = threading.Event()
    server._loop.call_soon_threadsafe(held.wait, TIMEOUT_S)
    until(lambda: sign()[1])
    stuck = sign()
    assert stuck[1] and sign() == stuck
    held.set()
    until(lambda: not sign()[1])


def test_connection_bounds_the_attachments_that_come_in_at_once(dial: Callable[..., socket.socket]) -> None:
    upload = b"PUT /v1/attachments/card HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    coming = [dial(f"127.0.0.{1 + i // MAX_UPLOADS_OF_UNIT}") for i in range(MAX_UPLOADS)]
    for sock in coming:
        sock.sendall(upload.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
        assert sock.recv(65536).startswith(b"HTTP/1.1 100 ")
    for source in ("127.0.0.1", "127.0.0.9"):  # of an address that has its share, and of one that has none
        more = dial(source)
        more.sendall(upload)
        assert head_of(read_all(more)) == (429, "queue_full")
    coming[-1].sendall(b"123456789")
    assert coming[-1].recv(65536).startswith(b"HTTP/1.1 400 ")
    more = dial()
    more.sendall(upload)
    assert head_of(read_all(more)) == (429, "queue_full")  # there is room, and not for an address with its share
    coming[0].sendall(b"123456789")
    assert coming[0].recv(65536).startswith(b"HTTP/1.1 400 ")  # this bundle takes none, but it has come
    more = dial()
    more.sendall(upload + b"123456789")
    assert more.recv(65536).startswith(b"HTTP/1.1 400 ")
