"""Requests of a pool of devices: one of them answers an id, whichever of them the broker gives it to.

A device stores and computes a request at once, and claims its id on a topic that all devices of the pool hear. The
broker hands claims on to all in one order, and the first one counts: its device publishes the answer, any other deletes
its own. A later claim tells the owner that its client asked again, perhaps for something else under that id.
"""

import hashlib
import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Final

from msgspec import Meta, Struct

from edge.config import Device
from edge.delivery.journal import Journal
from edge.delivery.open_requests import OpenRequests, Sender, conflict
from edge.delivery.publisher import Message, Publisher
from edge.delivery.replies import Replies
from shared.messages import encode, error_response

log = logging.getLogger(__name__)

SILENCE_S: Final = 30.0
"""How long the broker may take to hand on our own claim before the log says so."""


@dataclass(frozen=True)
class Member:
    """A device of a pool. topic: of the pool's claims."""

    device: str
    topic: str


class Claim(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="claim"):
    """A device has that request. key, payload_sha256: hashes of its identity and of its content, in hex."""

    device: Device
    key: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
    payload_sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


@dataclass(frozen=True)
class _Heard:
    claim: Claim
    correlation: bytes | None
    acknowledge: Callable[[], None]


class Pool:
    """The claims of a device, for the outbox. member: None for one that is in no pool.

    `key`, `claim` and `tell_owner` are for any thread, all else is for the one that publishes.

    unsettled: numbers of the requests whose claim the broker has not handed on: their answers wait.
    """

    def __init__(
        self, member: Member | None, journal: Journal, *, opened: OpenRequests, replies: Replies, publisher: Publisher
    ) -> None:
        self.unsettled: set[int] = set()
        self._member = member
        self._journal = journal
        self._open = opened
        self._replies = replies
        self._publisher = publisher
        self._heard: list[_Heard] = []
        self._silent_since_s: float | None = None

    def start(self) -> None:
        """Read which claims are unsettled. A device that has left its pool answers all that it took."""
        if self._member is None:
            self._journal.win_all()
        self.unsettled = {seq for _, seq, _, _ in self._journal.unsettled()}

    def key(self, sender: Sender, id: str | None) -> bytes | None:
        """What a request is claimed by; None for one that is not the pool's, or has no id."""
        if self._member is None or not sender.pooled or id is None:
            return None
        return hashlib.blake2b("\0".join((sender.client, sender.address, id)).encode(), digest_size=16).digest()

    def claim(self, seq: int, key: bytes, payload_sha256: bytes, correlation: bytes | None) -> None:
        """Claim a request that the journal has."""
        assert self._member is not None
        self.unsettled.add(seq)
        claim = self._encoded(key, payload_sha256)
        self._replies.send(Message(self._member.topic, correlation, claim, done=lambda: None))

    def tell_owner(self, key: bytes, payload_sha256: bytes, sender: Sender) -> None:
        """Another device answers this request: a claim, which comes too late, tells it that its client asked again."""
        assert self._member is not None
        self._replies.reply(replace(sender, address=self._member.topic), lambda: self._encoded(key, payload_sha256))

    def connected(self) -> None:
        """Claim again what is unsettled: the broker may have lost it."""
        self._silent_since_s = None
        for key, seq, payload_sha256, correlation in self._journal.unsettled() if self._member else ():
            self.claim(seq, key, payload_sha256, correlation)

    def hear(self, claim: Claim, correlation: bytes | None, acknowledge: Callable[[], None]) -> None:
        """A claim came; `settle` follows."""
        self._heard.append(_Heard(claim, correlation, acknowledge))

    @property
    def waiting(self) -> bool:
        """Whether claims wait for room on the disk."""
        return bool(self._heard)

    def settle(self) -> None:
        """Settle the claims that came, in one transaction. On a full disk they wait."""
        self._complain()
        if not self._heard or self._member is None:
            return
        claims = [(bytes.fromhex(h.claim.key), h.claim.device == self._member.device) for h in self._heard]
        try:
            outcomes = self._journal.settle(claims)
        except sqlite3.Error as error:
            log.warning("%d claims of the pool wait to be stored: %s", len(claims), error)
            return
        heard, self._heard = self._heard, []
        for each, (outcome, seq) in zip(heard, outcomes, strict=True):
            if outcome == "asked again" and seq is not None and self._answer_again(seq, each):
                continue
            each.acknowledge()
            if outcome == "won" and seq in self.unsettled:
                self.unsettled.remove(seq)
                self._silent_since_s = None
                if (entry := self._journal.entry(seq)) is not None and entry.answer is not None:
                    self._publisher.add_answer(seq)
            elif outcome == "lost" and seq is not None:
                self.unsettled.discard(seq)
                if (opened := self._open.get(seq)) is not None:
                    opened.cancelled = True
                    self._open.remove(seq)

    def _answer_again(self, seq: int, heard: _Heard) -> bool:
        """Its client asked another device again.  → whether a reply is under way, which acknowledges the claim"""
        entry = self._journal.entry(seq)
        if entry is None:
            return False
        payload = entry.answer
        if heard.claim.payload_sha256 != entry.payload_sha256.hex():
            payload = encode(error_response(conflict(entry.id), entry.id))
        elif payload is None and (opened := self._open.get(seq)) is not None:
            opened.correlation = heard.correlation
        if payload is None:
            return False
        if not self._replies.limits.take(entry.client, reliable=True):
            return True  # the claim comes again

        def done() -> None:
            self._replies.limits.give_back()
            heard.acknowledge()

        self._publisher.add_reply(Message(entry.address, heard.correlation, payload, seq, done=done))
        return True

    def _encoded(self, key: bytes, payload_sha256: bytes) -> bytes:
        assert self._member is not None
        return encode(Claim(device=self._member.device, key=key.hex(), payload_sha256=payload_sha256.hex()))

    def _complain(self) -> None:
        """Say once a connection that our own claims do not come back: without them no answer goes out."""
        now_s = time.monotonic()
        if not self.unsettled or self._member is None or not self._publisher.is_connected:
            self._silent_since_s = None
        elif self._silent_since_s is None:
            self._silent_since_s = now_s
        elif now_s - self._silent_since_s > SILENCE_S:
            self._silent_since_s = float("inf")
            log.error(
                "the broker has not handed on our own claims on %s for %.0f s, and answers of the pool wait for them: "
                "let each device of it read and write there",
                self._member.topic,
                SILENCE_S,
            )
