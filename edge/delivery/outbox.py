"""Between a transport that may lose messages and the scheduler: one answer per accepted request, repeated on request.

Commit, acknowledge, generate, store, publish, record the delivery, in this order. A thread of its own stores and
publishes, several answers in one transaction, so that neither computing nor the network waits for the disk. Memory is
bounded: accepted requests by the scheduler, unstored replies by ReplyLimits, messages in flight by the publisher.
"""

import hashlib
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Final

from edge.delivery.direct import DIRECT, DirectRequests
from edge.delivery.journal import MAX_ATTEMPTS, Entry, Journal
from edge.delivery.open_requests import OpenRequest, OpenRequests, Sender, conflict
from edge.delivery.pictures import put_aside, put_back
from edge.delivery.pool import Claim, Member, Pool
from edge.delivery.publisher import Outcomes, Publisher, Send
from edge.delivery.replies import Replies
from edge.serving.runs import Plan
from edge.serving.scheduler import Scheduler
from edge.system.heartbeat import Heartbeat
from shared.errors import RequestError
from shared.messages import MAX_DEADLINE_MS, GenerateRequest, Partial, Reply, Response, encode, error_response

log = logging.getLogger(__name__)

RETRY_S: Final = 0.5
"""Delay before storing is tried again, when the disk is full."""
PRUNE_S: Final = 600.0
MAX_WORK: Final = 256
"""Events per transaction; answers wait for its end."""
SNAPSHOT_S: Final = 0.2
"""Least time between two snapshots of a request: every subscriber of the topic gets each."""


class Outbox:
    """Accepts requests for a scheduler and delivers their answers.

    send: see Publisher. show: publishes a snapshot (client, id, correlation data, partial). Both must return at once;
    they are for MQTT. member: of a pool of devices. redeliver: see Replies. direct: accepts the requests of clients
    that wait on a connection.
    """

    def __init__(
        self,
        journal: Journal,
        scheduler: Scheduler,
        *,
        send: Send = lambda connection, message: None,
        show: Callable[[str, str, bytes | None, Partial], None] = lambda client, id, correlation, partial: None,
        member: Member | None = None,
        redeliver: Callable[[], None] = lambda: None,
    ) -> None:
        self.replies = Replies(scheduler, lambda m: self._work.put(lambda: self._publisher.add_reply(m)), redeliver)
        self._journal = journal
        self._scheduler = scheduler
        self._show = show
        self._open = OpenRequests()
        self.direct = DirectRequests(journal, scheduler, self._open, self._reply)
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._unstored: list[tuple[int, bytes]] = []  # this and all below belong to the thread
        self._publisher = Publisher(journal, send)
        self._pool = Pool(member, journal, opened=self._open, replies=self.replies, publisher=self._publisher)
        self._pruned_s = float("-inf")
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self.heartbeat = Heartbeat(self._thread)

    def start(self) -> None:
        """Queue undelivered answers, resume unfinished requests, and begin to serve."""
        self._pool.start()
        for seq in self._journal.undelivered():
            if seq not in self._pool.unsettled:
                self._publisher.add_answer(seq)
        for entry in self._journal.unfinished():
            self._resume(entry)
        self._journal.computing([])
        self._scheduler.watch(self._journal.computing)
        self._thread.start()

    def accept(
        self,
        sender: Sender,
        request: GenerateRequest,
        within_s: float | None,
        attached: Callable[[GenerateRequest], GenerateRequest] = lambda request: request,
    ) -> None:
        """Accept or refuse a request, and acknowledge it once the broker need not keep it.

        While draining, a reliable request is left with the broker for the next daemon. within_s: the message's expiry,
        beside the request's own deadline. attached: puts attachments in place; raises RequestError. Called from one
        thread only; a request with a condition is accepted later, in another.
        """
        if self._stopping:
            return  # the broker keeps it for the next daemon
        digest = hashlib.sha256(encode(request)).digest()
        opened = OpenRequest(sender.client, sender.address, request.id, sender.correlation, digest)
        if (arriving := self._open.arrive(opened, sender.acknowledge)) is not None:
            if arriving.payload_sha256 != digest:
                self.replies.refuse(sender, conflict(request.id), request.id)
            return
        key = self._pool.key(sender, request.id)
        try:
            known = None if request.id is None else self._journal.find(sender.client, sender.address, request.id)
            taken = known is None and key is not None and self._journal.is_taken(key)
            whole = request if taken or known is not None else attached(request)
        except Exception:
            self._open.leave(opened)
            raise
        if known is not None:
            self._open.leave(opened)
            if known.payload_sha256 != digest:
                self.replies.refuse(sender, conflict(request.id), request.id)
            else:
                self._repeat(known, sender)
            return
        if taken and key is not None:
            self._open.leave(opened)
            self._pool.tell_owner(key, digest, sender)
            return
        bounds = [s for s in (within_s, _seconds(request.deadline_ms)) if s is not None]
        deadline_s = time.time() + min(bounds) if bounds else None
        seq: int | None = None

        def commit(plan: Plan) -> int:
            nonlocal seq
            stored, pictures = put_aside(whole, plan.seed)
            seq = self._journal.accept(
                client=sender.client,
                address=sender.address,
                id=request.id,
                payload_sha256=digest,
                request=stored,
                correlation=sender.correlation,
                bundle=self._scheduler.model,
                deadline_s=deadline_s,
                pictures=pictures,
                claim=key,
            )
            if key is not None:
                self._pool.claim(seq, key, digest, sender.correlation)
            for acknowledge in (sender.acknowledge, *self._open.add(seq, opened)):
                acknowledge()
            return seq

        def reply(message: Reply) -> None:
            if seq is not None:
                self._reply(seq, message)
            elif isinstance(message, Response):
                again = self._open.leave(opened)
                if not (sender.reliable and _is_draining(message)):
                    self.replies.reply(sender, lambda: encode(message))
                    for acknowledge in again:
                        acknowledge()

        self._submit(whole, reply, opened=opened, commit=commit, within_s=min(bounds, default=None))

    def cancel(self, client: str | None, id: str, address: str | None) -> None:
        """Cancel a client's unfinished requests of that id, or only those answered at `address`.

        client: None for senders on plain topics.
        """
        self._open.cancel(client, address, id)

    def hear_claim(self, claim: Claim, correlation: bytes | None, acknowledge: Callable[[], None]) -> None:
        """A device of the pool claims a request, perhaps this one. Acknowledged once that is stored."""
        self._work.put(lambda: self._pool.hear(claim, correlation, acknowledge))

    def connected(self, connection: int, receive_maximum: int) -> None:
        """A connection is up. receive_maximum: unacknowledged messages that the broker takes."""
        self._work.put(lambda: self._publisher.connected(connection, receive_maximum))
        self._work.put(self._pool.connected)

    def lost(self) -> None:
        """The connection is gone, with everything that was not acknowledged."""
        self._work.put(self._publisher.lost)

    def acknowledged(self, number: int, refusal: str | None) -> None:
        """The broker took the message of that number, or refused it."""
        self._work.put(lambda: self._publisher.acknowledged(number, refusal))

    def close(self, timeout_s: float) -> None:
        """Store and publish the answers there are; unfinished requests stay in the journal for the next start."""
        self._stopping = True
        self._work.put(lambda: None)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._journal.close(orderly=self._scheduler.failure is None)

    def _repeat(self, known: Entry, sender: Sender) -> None:
        """A request was sent again: send its answer now, or once it is computed."""
        opened = self._open.get(known.seq)
        if opened is not None:
            opened.correlation = sender.correlation
        if opened is not None or known.seq in self._pool.unsettled:
            sender.acknowledge()
            return
        entry = known if known.answer is not None else self._journal.entry(known.seq)  # perhaps answered since
        if entry is not None and (answer := entry.answer) is not None:
            self.replies.reply(sender, lambda: answer, known.seq)

    def _resume(self, entry: Entry) -> None:
        opened = OpenRequest(entry.client, entry.address, entry.id, entry.correlation)
        self._open.add(entry.seq, opened)
        try:
            request = put_back(entry.request, self._journal.pictures(entry.seq))
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
            opened=opened,
            commit=lambda plan: entry.seq,
            within_s=within_s,
            resumed=True,
            alone=entry.suspect,
        )

    def _submit(
        self,
        request: GenerateRequest,
        reply: Callable[[Reply], None],
        *,
        opened: OpenRequest,
        commit: Callable[[Plan], int],
        within_s: float | None,
        **more: bool,
    ) -> None:
        self._scheduler.submit(
            request,
            reply,
            gone=lambda: opened.cancelled,
            client=opened.client,
            commit=commit,
            within_s=within_s,
            partial_every_s=SNAPSHOT_S,
            **more,
        )

    def _reply(self, seq: int, reply: Reply) -> None:
        opened = self._open.get(seq)
        if opened is None:
            return
        if opened.address == DIRECT and (
            isinstance(reply, Partial) or (isinstance(reply, Response) and _is_draining(reply))
        ):
            self.direct.tell(seq, reply)
        elif isinstance(reply, Partial):
            if opened.id is not None and seq not in self._pool.unsettled:
                self._show(opened.client, opened.id, opened.correlation, reply)
        elif isinstance(reply, Response) and not _is_draining(reply):
            self._work.put(lambda: self._unstored.append((seq, encode(reply))))
        # A request that a drain cuts off is finished after the next start.

    def _run(self) -> None:
        while not (self._stopping and self._work.empty() and not self._unstored and self._publisher.idle):
            try:
                work = self._wait()
                with self.heartbeat:
                    self._do(work)
                    self._store()
                    self._pool.settle()
                    self._publisher.pump()
                    if time.monotonic() - self._pruned_s > PRUNE_S:
                        self._pruned_s = time.monotonic()
                        self._journal.prune()
            except Exception:  # the thread must go on
                log.exception("an answer could not be handed on")

    def _wait(self) -> Callable[[], None] | None:
        """The next event; None after a timeout."""
        try:
            return self._work.get(timeout=self._timeout_s())
        except queue.Empty:
            return None

    def _do(self, work: Callable[[], None] | None) -> None:
        """Handle that event and those waiting, up to MAX_WORK."""
        if work is not None:
            work()
        for _ in range(MAX_WORK):
            if self._work.empty():
                return
            self._work.get()()

    def _timeout_s(self) -> float:
        if self._unstored or self._publisher.outcomes or self._pool.waiting:
            return RETRY_S
        next_s = self._publisher.next_s
        return PRUNE_S if next_s is None else max(0.0, next_s - time.monotonic())

    def _store(self) -> None:
        """Store answers and outcomes of sending in one transaction. On a full disk they wait."""
        outcomes = self._publisher.outcomes
        if not self._unstored and not outcomes:
            return
        answers = []
        direct = set()
        for seq, payload in self._unstored:
            opened = self._open.get(seq)
            answers.append((seq, payload, None if opened is None else opened.correlation))
            if opened is not None and opened.address == DIRECT:
                direct.add(seq)
        try:
            self._journal.record(answers, [*outcomes.delivered, *direct], outcomes.tried, outcomes.given_up)
        except sqlite3.Error as error:
            log.warning("%d answers wait to be stored: %s", len(answers), error)
            return
        self._unstored = []
        self._scheduler.requests.note_lost(undeliverable=len(outcomes.given_up))
        self._publisher.outcomes = Outcomes()
        for seq, payload, _ in answers:
            self._open.remove(seq)
            if seq in direct:
                self.direct.answered(seq, payload)
            elif seq not in self._pool.unsettled:
                self._publisher.add_answer(seq)


def _is_draining(response: Response) -> bool:
    return response.error is not None and response.error.code == "draining"


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1e3
