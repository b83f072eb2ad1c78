"""Between a transport that may lose messages and the scheduler: what was accepted is answered once, and the same again.

Commit, then acknowledge, then generate, then store, then publish, then note that it arrived. One thread of its own
stores and publishes, several answers in one transaction, so that neither the engine nor the network waits for the disk.
"""

import hashlib
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from edge.delivery.journal import MAX_ATTEMPTS, Entry, Journal
from edge.serving.loaded_bundle import Plan
from edge.serving.scheduler import Scheduler
from edge.system.heartbeat import Heartbeat
from shared.errors import RequestError
from shared.messages import (
    MAX_DEADLINE_MS,
    GenerateRequest,
    Partial,
    Reply,
    Response,
    decode_request,
    encode,
    error_response,
)

log = logging.getLogger("edgelm")

RETRY_S: Final = 0.5
"""How long answers that found no room wait before they are tried again."""
PRUNE_S: Final = 600.0
SNAPSHOT_S: Final = 0.2
"""From one snapshot to the next: every subscriber of the topic gets each."""


@dataclass(frozen=True)
class Letter:
    """A terminal answer to publish. seq: its number in the journal; None for a refusal, which is not kept there.

    then: to be called once it arrived.
    """

    address: str
    correlation: bytes | None
    payload: bytes
    seq: int | None = None
    then: Callable[[], None] | None = None


@dataclass(eq=False)
class _Open:
    """An accepted request without an answer."""

    address: str
    id: str | None
    correlation: bytes | None
    cancelled: bool = False


class Promises:
    """Accepts requests for a scheduler and sees to their answers.

    send: hands a letter to the transport and returns its number there, for `arrived`. show: takes
    snapshots, as (id, correlation data, partial). Both are called from threads of ours and must return at once.
    """

    def __init__(
        self,
        journal: Journal,
        scheduler: Scheduler,
        send: Callable[[Letter], int],
        show: Callable[[str, bytes | None, Partial], None],
    ) -> None:
        self._journal = journal
        self._scheduler = scheduler
        self._send = send
        self._show = show
        self._open: dict[int, _Open] = {}
        self._lock = threading.Lock()  # guards the above
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False

        self._unstored: list[tuple[int, bytes]] = []  # these are the thread's alone: answers,
        self._unmarked: list[int] = []  # arrivals,
        self._under_way: dict[int, Letter] = {}  # and what was published and did not arrive yet
        self._pruned_s = float("-inf")
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self.heartbeat = Heartbeat(self._thread)

    def start(self) -> None:
        """Publish what was not delivered, take up what was not finished, and begin to serve."""
        for seq in self._journal.undelivered():
            if (stored := self._journal.entry(seq)) is not None:
                self._post(_letter(stored, stored.correlation))
        for entry in self._journal.unfinished():
            self._resume(entry)
        self._journal.computing([])
        self._scheduler.watch = self._journal.computing
        self._thread.start()

    def accept(
        self,
        address: str,
        correlation: bytes | None,
        request: GenerateRequest,
        within_s: float | None,
        accepted: Callable[[], None],
    ) -> None:
        """Accept a request, or refuse it; `accepted` is called when the sender need not keep it any longer.

        within_s: how long it is of use, if not as long as its own deadline. Called from one thread only.
        """
        digest = hashlib.sha256(encode(request)).digest()
        known = None if request.id is None else self._journal.find(_client(address), address, request.id)
        if known is not None and known.payload_sha256 != digest:
            message = f"`id` {request.id!r} was given to another request before; each needs its own"
            self.refuse(address, correlation, error_response(RequestError("conflict", message), request.id), accepted)
            return
        if known is not None:
            self._again(known, correlation)
            accepted()
            return
        bounds = [s for s in (within_s, _seconds(request.deadline_ms)) if s is not None]
        deadline_s = time.time() + min(bounds) if bounds else None
        opened = _Open(address, request.id, correlation)
        seq: int | None = None

        def commit(plan: Plan) -> int:
            nonlocal seq
            fixed = encode(replace(request, seed=plan.seed))
            bundle = self._scheduler.model
            seq = self._journal.accept(
                client=_client(address),
                address=address,
                id=request.id,
                payload_sha256=digest,
                request=fixed,
                correlation=correlation,
                bundle=bundle,
                deadline_s=deadline_s,
            )
            with self._lock:
                self._open[seq] = opened
            accepted()
            return seq

        def reply(message: Reply) -> None:
            if seq is None and isinstance(message, Response):
                self.refuse(address, correlation, message, accepted)
            elif seq is not None:
                self._reply(seq, message)

        self._submit(request, reply, opened, commit, min(bounds, default=None))

    def cancel(self, id: str, address: str | None) -> None:
        """Stop the unfinished requests of that id, or the one of them that is answered at `address`."""
        with self._lock:
            for opened in self._open.values():
                opened.cancelled |= opened.id == id and address in (None, opened.address)

    def refuse(
        self, address: str, correlation: bytes | None, response: Response, then: Callable[[], None] | None = None
    ) -> None:
        """Answer without keeping it."""
        self._post(Letter(address, correlation, encode(response), then=then))

    def arrived(self, number: int) -> None:
        """The letter of that number reached its broker."""
        self._work.put(lambda: self._mark(number))

    def send_again(self) -> None:
        """The transport lost what it was handed."""
        self._work.put(self._send_again)

    def close(self, patience_s: float) -> None:
        """Store and publish what is answered; what is not stays in the journal for the next start."""
        self._stopping = True
        self._work.put(lambda: None)
        self._thread.join(patience_s)
        if not self._thread.is_alive():
            self._journal.close(orderly=self._scheduler.failure is None)

    def _again(self, known: Entry, correlation: bytes | None) -> None:
        """A request that was sent again: its answer goes out now, or when it is there."""
        with self._lock:
            opened = self._open.get(known.seq)
            if opened is not None:
                opened.correlation = correlation
        if opened is None and known.answer is None:  # answered since it was looked up
            known = self._journal.entry(known.seq) or known
        if known.answer is not None:
            self._post(_letter(known, correlation))

    def _resume(self, entry: Entry) -> None:
        opened = self._open[entry.seq] = _Open(entry.address, entry.id, entry.correlation)
        try:
            request = decode_request(entry.request)
        except RequestError as error:  # written by another release
            self._reply(entry.seq, error_response(error, entry.id))
            return
        if entry.attempts >= MAX_ATTEMPTS:
            message = (
                f"the daemon ended {entry.attempts} times while it worked on this request alone; it is not tried again"
            )
            self._reply(entry.seq, error_response(RequestError("internal", message), entry.id))
            return
        within_s = None
        if entry.deadline_s is not None:  # the clock may have been set meanwhile
            within_s = min(max(0.0, entry.deadline_s - time.time()), MAX_DEADLINE_MS / 1e3)
        self._journal.computing([entry.seq])  # preparing it may be what ends the process
        self._submit(
            request,
            lambda reply: self._reply(entry.seq, reply),
            opened,
            lambda plan: entry.seq,
            within_s,
            resumed=True,
            alone=entry.suspect,
        )

    def _submit(
        self,
        request: GenerateRequest,
        reply: Callable[[Reply], None],
        opened: _Open,
        commit: Callable[[Plan], int],
        within_s: float | None,
        **more: bool,
    ) -> None:
        client = _client(opened.address)
        self._scheduler.submit(
            request, reply, lambda: opened.cancelled, client, commit, within_s, partial_every_s=SNAPSHOT_S, **more
        )

    def _reply(self, seq: int, reply: Reply) -> None:
        with self._lock:
            opened = self._open[seq]
        if isinstance(reply, Partial):
            if opened.id is not None:
                self._show(opened.id, opened.correlation, reply)
        elif isinstance(reply, Response) and (reply.error is None or reply.error.code != "draining"):
            self._work.put(lambda: self._unstored.append((seq, encode(reply))))
        # An accepted request that a drain cut off is finished after the next start.

    def _post(self, letter: Letter) -> None:
        self._work.put(lambda: self._publish(letter))

    def _run(self) -> None:
        while not (self._stopping and self._work.empty() and not self._under_way and not self._unstored):
            try:
                work = self._wait()
                with self.heartbeat:
                    self._do(work)
                    self._store()
                    if time.monotonic() - self._pruned_s > PRUNE_S:
                        self._pruned_s = time.monotonic()
                        self._journal.prune()
            except Exception:  # the thread must live on
                log.exception("an answer could not be handed on")

    def _wait(self) -> Callable[[], None] | None:
        """The next piece of work; None when it is time to look around."""
        try:
            return self._work.get(timeout=RETRY_S if self._unstored or self._unmarked else PRUNE_S)
        except queue.Empty:
            return None

    def _do(self, work: Callable[[], None] | None) -> None:
        """That, and all there is, for one transaction."""
        while work is not None:
            work()
            work = None if self._work.empty() else self._work.get()

    def _store(self) -> None:
        """Keep answers and arrivals in one transaction, then publish the answers. On a full disk they wait."""
        if not self._unstored and not self._unmarked:
            return
        try:
            answers = [(seq, payload, self._open[seq].correlation) for seq, payload in self._unstored]
            self._journal.record(answers, self._unmarked)
        except sqlite3.Error as error:
            log.warning("%d answers wait to be stored: %s", len(self._unstored), error)
            return
        stored, self._unstored, self._unmarked = self._unstored, [], []
        for seq, payload in stored:
            with self._lock:
                opened = self._open.pop(seq)
            self._post(Letter(opened.address, opened.correlation, payload, seq))

    def _publish(self, letter: Letter) -> None:
        self._under_way[self._send(letter)] = letter

    def _mark(self, number: int) -> None:
        letter = self._under_way.pop(number, None)  # None: nothing of ours, or sent again meanwhile
        if letter is None:
            return
        if letter.seq is not None:
            self._unmarked.append(letter.seq)
        if letter.then is not None:
            letter.then()

    def _send_again(self) -> None:
        letters, self._under_way = list(self._under_way.values()), {}
        for letter in letters:
            self._publish(letter)


def _client(address: str) -> str:
    """Whose answer goes there: edgelm/reply/CLIENT/…"""
    return "/".join(address.split("/")[:3])


def _letter(entry: Entry, correlation: bytes | None) -> Letter:
    assert entry.answer is not None
    return Letter(entry.address, correlation, entry.answer, entry.seq)


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1e3
