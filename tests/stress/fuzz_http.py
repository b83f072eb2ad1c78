"""Mutated HTTP requests for the daemon's live server: `python -m tests.stress.fuzz_http --requests N`.

Requests that are right are mutated in their bytes, their headers and their JSON, and sent many to a connection. Each
gets an answer with a status of our table, with its code where it is an error; where the next request cannot be found,
such an answer ends the connection. At the end the daemon lives, serves, has logged no error, and is no larger.
"""

import argparse
import json
import random
import re
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

from edge.config import default_bundle
from shared.errors import ERROR_CODES, run_main
from tests.integration.harness import Daemon
from tests.integration.http_client import address_of, ask, complete
from tests.stress.soak import resources
from tests.support.spoilt import wrong

AT_ONCE: Final = 4
"""Connections."""
ROUND: Final = 200
"""Connections between two looks at the daemon; each repeats itself by the seed and its number."""
PIPELINED: Final = 40
"""Requests sent before their answers are read, at most: the first that may break the framing is the last of its
connection, so that every request sent is one that the daemon has to look at.
"""
BREAKING: Final = 0.06
"""Share of requests whose head or bytes are changed so that the next one may not be found."""
ADDRESSES: Final = 200 * 250
"""Of this machine's own network, from which the connections come in turn: one alone is refused 20 times a second."""
SETTLED: Final = 600
"""Connections after which memory is looked at first."""
MOST_GROWTH_KB: Final = 16 * 1024
TIMEOUT_S: Final = 60.0
STATUSES: Final = {200} | {status for status, _ in ERROR_CODES.values()}
BODIES: Final[tuple[dict[str, object], ...]] = (
    {"prompt": "Once upon a time", "max_tokens": 2, "seed": 1},
    {"prompt": "Tom had a", "suffix": " and it was red.", "max_tokens": 2, "temperature": 0.5},
    {"segments": ["Tom had a ", {"gap": 2}, "."], "steps": 2, "top_k": 5, "top_p": 0.9},
    {"prompt": "a", "max_tokens": 1, "stream": True, "stream_options": {"include_usage": True}, "snapshots": True},
    {"prompt": "a", "max_tokens": 2, "stop": ["b", "c"], "model": "m", "user": "u", "n": 1, "logprobs": None},
)
PATHS: Final = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/openapi.json", "/fleet", "/page/page.js")
METHODS: Final = ("GET", "POST", "PUT", "OPTIONS", "DELETE", "PRI")
HEADERS: Final = (
    "Expect: 100-continue",
    "Origin: http://evil.example",
    "Origin: null",
    "Sec-Fetch-Site: cross-site",
    "Idempotency-Key: a",
    "Idempotency-Key: a/b",
    "Authorization: Bearer x",
    "X-Long: " + "a" * 5000,
    "X-Odd: \x80\xff",
    "Range: bytes=0-",
    "TE: trailers",
    "Accept-Encoding: gzip",
    "Content-Type: text/plain",
    "Content-Type:",
    "Cookie: " + "a=b;" * 99,
)
"""Headers after which the next request can still be found, or the connection is refused as a whole."""
BREAKING_HEADERS: Final = (
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip",
    "Content-Length: 5",
    "Content-Length: -1",
    "Host: evil.example",
    "Content-Length: 99999999999999999999",
    "Connection: close",
    "Connection: upgrade\r\nUpgrade: websocket",
    ": none",
    "Bad Name: 1",
    " Folded: 1",
    "X-Null: \0",
    "X-Cr: a\rb",
    "X-Huge: " + "a" * 20_000,
)


def request(luck: random.Random) -> bytes:
    """A request that is right, but for its JSON perhaps."""
    if luck.random() < 0.3:
        return f"GET {luck.choice(PATHS)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    body = luck.choice(BODIES)
    data = json.dumps(body).encode() if luck.random() < 0.3 else wrong(body, luck)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    if luck.random() < 0.2:
        cut = luck.randrange(len(data) + 1)
        pieces = [piece for piece in (data[:cut], data[cut:]) if piece]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def mutated(raw: bytes, luck: random.Random) -> bytes:
    """The same with another header, method or path, or as it is: the next request can be found after it."""
    kind = luck.random()
    if kind < 0.5:
        return raw
    if kind < 0.8:
        return with_header(raw, luck.choice(HEADERS))
    path = luck.choice((*PATHS, "/..", "/page/../server.py", "*", "/%00", "/?" + "q" * 99, "http://localhost/"))
    return f"{luck.choice(METHODS)} {path}".encode() + raw[raw.index(b" HTTP/1.1") :]


def broken(raw: bytes, luck: random.Random) -> bytes:
    """The same with a header that contradicts it, or with some bytes changed, taken out, put in, or cut off."""
    kind = luck.random()
    if kind < 0.3:
        return with_header(raw, luck.choice(BREAKING_HEADERS))
    if kind < 0.4:
        return raw[: luck.randrange(len(raw))]
    changed = bytearray(raw)
    for _ in range(luck.randrange(1, 4)):
        at = luck.randrange(len(changed) + 1)
        if kind < 0.6 and at < len(changed):
            changed[at] = luck.randrange(256)
        elif kind < 0.8:
            del changed[at : at + luck.randrange(1, 9)]
        else:
            changed[at:at] = bytes(luck.randrange(256) for _ in range(luck.randrange(1, 9)))
    return bytes(changed)


def with_header(raw: bytes, header: str) -> bytes:
    """A request with one more header, the first."""
    at = raw.index(b"\r\n") + 2
    return raw[:at] + header.encode("latin-1") + b"\r\n" + raw[at:]


@dataclass
class Reader:
    """Answers off one connection, framed as HTTP/1.1 has it. hung_up: we send no more, and a stream may end early."""

    sock: socket.socket
    hung_up: bool = False
    buffer: bytearray = field(default_factory=bytearray)

    def answers(self) -> Iterator[tuple[int, bytes]]:
        """(status, body) of each, to the end of the connection. None answers HEAD, whose body could not be told."""
        while (head := self._until(b"\r\n\r\n")) is not None:
            head = head.lower()
            status = int(head.split(b" ", 2)[1])
            if status == 100:
                continue
            length = re.search(rb"\r\ncontent-length: (\d+)", head)
            if length is not None:
                yield status, self._exactly(int(length[1]))
            else:
                yield status, self._chunks() if b"\r\ntransfer-encoding: chunked" in head else self._rest()

    def _chunks(self) -> bytes:
        body = bytearray()
        while (line := self._until(b"\r\n")) is not None and (size := int(line, 16)):
            body += self._exactly(size + 2)[:-2]
        assert self._until(b"\r\n") is not None or self.hung_up, "a stream ended early"
        return bytes(body)

    def _exactly(self, size: int) -> bytes:
        while len(self.buffer) < size and self._more():
            pass
        assert len(self.buffer) >= size, "an answer ended early"
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    def _rest(self) -> bytes:
        while self._more():
            pass
        taken, self.buffer = bytes(self.buffer), bytearray()
        return taken

    def _until(self, mark: bytes) -> bytes | None:
        while (at := self.buffer.find(mark)) < 0:
            if not self._more():
                assert not self.buffer, f"half an answer: {bytes(self.buffer[:200])!r}"
                return None
        taken = bytes(self.buffer[:at])
        del self.buffer[: at + len(mark)]
        return taken

    def _more(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except ConnectionResetError:  # the daemon did not wait for the rest of what it had refused
            return False
        self.buffer += data
        return bool(data)


def check(status: int, body: bytes) -> str:
    """What an answer is: its status, or the code of its error, which belongs to it."""
    assert status in STATUSES, (status, body)
    if status == 200 or not body:
        return str(status)
    error = json.loads(body)["error"]
    assert error["message"] and error["type"] and ERROR_CODES[error["code"]][0] == status, (status, body)
    code: str = error["code"]
    return code


def one_connection(address: tuple[str, int], number: int, seed: int) -> tuple[int, Counter[str]]:
    """Send mutated requests, the last of them perhaps broken, and read to the end.  → how many, and what came back"""
    luck = random.Random(f"{seed} {number}")
    sent: list[bytes] = []
    whole = PIPELINED
    while len(sent) < PIPELINED:
        if luck.random() < BREAKING:
            whole = len(sent)
            sent.append(broken(request(luck), luck))
            break
        sent.append(mutated(request(luck), luck))
    source = f"127.{1 + number // 250 % 200}.{number % 250}.1"
    with socket.create_connection(address, TIMEOUT_S, source_address=(source, 0)) as sock:
        sock.sendall(b"".join(sent))
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" * (whole == PIPELINED))
        reader = Reader(sock)
        answers = reader.answers()
        got = Counter(check(status, body) for status, body in islice(answers, whole))
        if whole < PIPELINED:
            reader.hung_up = True
            sock.shutdown(socket.SHUT_WR)  # or the other half of a request would be waited for
        got += Counter(check(status, body) for status, body in answers)
    assert got.total() >= whole, (number, whole, got, sent)
    return len(sent), got


def run(*, requests: int, bundle: Path, seed: int, flags: Sequence[str], say: Callable[[str], None]) -> Counter[str]:
    """Fuzz a daemon of its own. Raises AssertionError with what was answered wrongly."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, ThreadPoolExecutor(AT_ONCE) as pool:
        daemon = Daemon(Path(name), bundle, "--backend", "fake", "--http", "127.0.0.1:0", *flags)
        try:
            address, began_s = address_of(daemon), time.monotonic()
            sent = number = 0
            first_kb = 0
            while sent < requests:
                for count, got in pool.map(partial(one_connection, address, seed=seed), range(number, number + ROUND)):
                    sent += count
                    found += got
                number += ROUND
                if number == SETTLED:
                    first_kb = resources(daemon.process.pid).resident_kb
                if number % 2000 == 0:
                    held, seconds = resources(daemon.process.pid), time.monotonic() - began_s
                    say(f"{sent} requests in {seconds:.0f} s, {found.total()} answers, {held}")
            assert daemon.process.poll() is None, "the daemon ended"
            assert ask(daemon, "/health").status == 200 and complete(daemon, prompt="a", max_tokens=1).status == 200
            log = daemon.log.read_text()
            assert "Traceback" not in log and "ERROR" not in log, log[-5000:]
            grown_kb = resources(daemon.process.pid).resident_kb - first_kb
            if number <= SETTLED:
                grown_kb = 0
            say(f"{sent} requests on {number} connections, {found.total()} answers; {grown_kb:+} kB after {SETTLED}")
            assert grown_kb < MOST_GROWTH_KB
        finally:
            daemon.close()
    return found


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.fuzz_http", description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--bundle", type=Path, default=default_bundle())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mqtt", metavar="HOST:PORT", help="a broker for the daemon, whose devices /fleet then tells")
    args = parser.parse_args()
    flags = () if args.mqtt is None else ("--mqtt", args.mqtt)
    found = run(requests=args.requests, bundle=args.bundle, seed=args.seed, flags=flags, say=partial(print, flush=True))
    print(dict(found.most_common()))
    return 0


if __name__ == "__main__":
    run_main(main)
