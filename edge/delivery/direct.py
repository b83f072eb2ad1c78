"""Requests with an id whose client waits on a connection of its own, as over HTTP: kept in the journal, answered there.

Hanging up does not cancel them: a client that asks again under the id gets the answer, the same bytes for as long as
the journal keeps it. A stored answer counts as delivered: its day begins then.
"""

from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from edge.delivery.journal import Journal
from edge.delivery.open_requests import OpenRequest, OpenRequests, conflict
from edge.delivery.pictures import put_aside
from edge.serving.runs import Plan
from edge.serving.scheduler import Scheduler
from edge.system.locked import Locked
from shared.errors import RequestError
from shared.messages import GenerateRequest, Reply, Response

DIRECT: Final = "#direct"
"""Client and address of these requests in the journal; no level of an MQTT topic has a `#`."""


ARRIVING_MS: Final = 500
"""When to ask again for what is being taken in: the pictures of a request may take a moment."""


class Waiter(Protocol):
    """A client that waits. gone: it has hung up."""

    @property
    def gone(self) -> bool: ...

    def answer(self, reply: Reply, accepted_s: float) -> None:
        """Take a snapshot or the answer, in any thread. accepted_s: when the request first came, in Unix time."""


class DirectRequests:
    """Accepts them for a scheduler. answer: hands a reply to the outbox, which stores it and calls `answered`."""

    def __init__(
        self, journal: Journal, scheduler: Scheduler, opened: OpenRequests, answer: Callable[[int, Reply], None]
    ) -> None:
        self._journal = journal
        self._scheduler = scheduler
        self._open = opened
        self._answer = answer
        self._waiting: Locked[dict[int, list[tuple[Waiter, float]]]] = Locked({})

    def accept(
        self,
        request: GenerateRequest,
        waiter: Waiter,
        *,
        attached: Callable[[GenerateRequest], GenerateRequest],
        digest: bytes,
        client: str,
        accepted_s: float,
        every_s: float,
    ) -> None:
        """Accept a request with an id, or refuse it by an answer; one that is known gets its answer once there is one.

        attached: puts attachments in place; raises RequestError. digest: of all that the client sent. client: for the
        fair queue. every_s: least time between snapshots. Raises RequestError `conflict` for an id that was given to
        something else. Called from one thread only.
        """
        assert request.id is not None
        opened = OpenRequest(DIRECT, DIRECT, request.id, None)
        if self._open.arrive(opened, lambda: None) is not None:
            raise RequestError("queue_full", f"`id` {request.id!r} is being taken in at this moment", ARRIVING_MS)
        known = self._journal.find(DIRECT, DIRECT, request.id)
        if known is None:
            try:
                whole = attached(request)
            except RequestError:
                self._open.leave(opened)
                raise
            self._submit(
                whole, waiter, opened=opened, digest=digest, client=client, accepted_s=accepted_s, every_s=every_s
            )
            return
        self._open.leave(opened)
        if known.payload_sha256 != digest:
            raise conflict(request.id)
        if self._wait(known.seq, waiter, known.accepted_s):
            return
        entry = self._journal.entry(known.seq)  # perhaps answered since
        if entry is None or entry.answer is None:
            raise RequestError("internal", "the answer is gone from the journal")
        waiter.answer(msgspec.json.decode(entry.answer, type=Response), entry.accepted_s)

    def tell(self, seq: int, reply: Reply) -> None:
        """A reply that is not stored, for those who wait."""
        with self._waiting as waiting:
            found = list(waiting.get(seq, ()))
        for waiter, accepted_s in found:
            waiter.answer(reply, accepted_s)

    def answered(self, seq: int, payload: bytes) -> None:
        """The answer is stored, and the request no longer open."""
        with self._waiting as waiting:
            found = waiting.pop(seq, [])
        if found:
            response = msgspec.json.decode(payload, type=Response)
            for waiter, accepted_s in found:
                waiter.answer(response, accepted_s)

    def _wait(self, seq: int, waiter: Waiter, accepted_s: float) -> bool:
        """Whether a request is still open; then its answer will go to `waiter`, too."""
        with self._waiting as waiting:
            if self._open.get(seq) is None:  # `answered` follows, and waits for this lock
                return False
            there = [other for other in waiting.get(seq, ()) if not other[0].gone]
            waiting[seq] = [*there, (waiter, accepted_s)]
            return True

    def _submit(
        self,
        request: GenerateRequest,
        waiter: Waiter,
        *,
        opened: OpenRequest,
        digest: bytes,
        client: str,
        accepted_s: float,
        every_s: float,
    ) -> None:
        seq: int | None = None

        def commit(plan: Plan) -> int:
            nonlocal seq
            stored, pictures = put_aside(request, plan.seed)
            within_s = None if request.deadline_ms is None else request.deadline_ms / 1e3
            seq = self._journal.accept(
                client=DIRECT,
                address=DIRECT,
                id=request.id,
                payload_sha256=digest,
                request=stored,
                correlation=None,
                bundle=self._scheduler.model,
                deadline_s=None if within_s is None else accepted_s + within_s,
                accepted_s=accepted_s,
                pictures=pictures,
            )
            self._open.add(seq, opened)
            self._wait(seq, waiter, accepted_s)
            return seq

        def reply(message: Reply) -> None:
            if seq is None:  # refused
                self._open.leave(opened)
                waiter.answer(message, accepted_s)
            else:
                self._answer(seq, message)

        self._scheduler.submit(
            request, reply, gone=lambda: opened.cancelled, client=client, commit=commit, partial_every_s=every_s
        )
