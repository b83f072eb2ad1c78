"""A device's claims in a pool: sent, sent again, and missed when they do not come back."""

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edge.delivery import pool
from edge.delivery.journal import Journal
from edge.delivery.open_requests import OpenRequests, Sender
from edge.delivery.pool import Claim, Member, Pool
from edge.delivery.publisher import Message, Publisher
from edge.delivery.replies import Replies
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.scheduler import Scheduler

SENDER = Sender("me", "edgelm/reply/me", b"c", True, lambda: None, pooled=True)
DIGEST = b"\1" * 32


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path)
    yield journal
    journal.close()


class Device:
    """A device of a pool, as far as its claims go. sent: what it published."""

    def __init__(self, journal: Journal, scheduler: Scheduler, member: Member | None) -> None:
        self.sent: list[Message] = []
        self.journal = journal
        self.publisher = Publisher(journal, self._send)
        replies = Replies(scheduler, self.publisher.add_reply)
        self.pool = Pool(member, journal, opened=OpenRequests(), replies=replies, publisher=self.publisher)
        self.publisher.connected(1, 16)
        self.pool.start()

    def _send(self, connection: int, message: Message) -> int:
        self.sent.append(message)
        return len(self.sent)

    def take(self, id: str = "a") -> int:
        """A request that is journaled and answered, but not settled."""
        key = self.pool.key(SENDER, id)
        assert key is not None
        seq = self.journal.accept(
            client=SENDER.client,
            address=SENDER.address,
            id=id,
            payload_sha256=DIGEST,
            request=b"{}",
            correlation=b"c",
            bundle="debug@0123",
            deadline_s=None,
            claim=key,
        )
        self.pool.claim(seq, key, DIGEST, b"c")
        self.journal.record([(seq, b'{"id":"a"}', b"c")])
        return seq

    def hear(self, device: str, payload_sha256: bytes = DIGEST) -> bool:
        """A claim to `a` comes.  → whether it was acknowledged at once"""
        acknowledged: list[bool] = []
        key = self.pool.key(SENDER, "a")
        assert key is not None
        claim = Claim(device=device, key=key.hex(), payload_sha256=payload_sha256.hex())
        self.pool.hear(claim, b"again", lambda: acknowledged.append(True))
        self.pool.settle()
        self.publisher.pump()
        return bool(acknowledged)


@pytest.fixture
def device(journal: Journal, debug_bundle: Path) -> Device:
    scheduler = Scheduler(LoadedBundle.load(debug_bundle, "fake", 1), 4)
    return Device(journal, scheduler, Member("dev", "edgelm/pool/kitchen/claim"))


def test_pool_answer_goes_out_once_its_own_claim_comes_back(device: Device) -> None:
    seq = device.take()
    device.publisher.pump()
    (claim,) = device.sent
    assert claim.address == "edgelm/pool/kitchen/claim" and claim.seq is None and claim.correlation == b"c"
    assert msgspec.json.decode(claim.payload, type=Claim).device == "dev"
    assert device.hear("dev") and [message.seq for message in device.sent[1:]] == [seq]


def test_pool_answer_to_what_another_device_has_claimed_never_goes_out(device: Device) -> None:
    device.take()
    assert device.hear("other") and device.hear("dev")
    assert [message.seq for message in device.sent] == [None] and device.journal.unfinished() == []


def test_pool_owner_repeats_its_answer_and_then_acknowledges_the_claim(device: Device) -> None:
    seq = device.take()
    device.hear("dev")
    assert not device.hear("other")
    assert device.sent[-1].seq == seq and device.sent[-1].correlation == b"again"
    device.hear("other", payload_sha256=b"\2" * 32)
    assert b'"conflict"' in device.sent[-1].payload


def test_pool_claims_again_what_is_unsettled_at_a_new_connection(device: Device) -> None:
    device.take()
    device.publisher.pump()
    device.publisher.lost()
    device.publisher.connected(2, 16)
    device.pool.connected()
    device.publisher.pump()
    assert len(device.sent) == 2 and device.sent[0].payload == device.sent[1].payload


def test_pool_says_once_that_its_claims_do_not_come_back(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool, "SILENCE_S", -1.0)
    device.take()
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            device.pool.settle()
    (record,) = caplog.records
    assert "let each device of it read and write there" in record.getMessage()


def test_pool_requests_without_an_id_or_of_the_device_itself_are_not_claimed(device: Device) -> None:
    assert device.pool.key(SENDER, None) is None
    assert device.pool.key(Sender("me", "edgelm/reply/me", None, True, lambda: None), "a") is None
