"""Whose answer counts in a pool of devices: that of the device whose claim was heard first."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import edge.delivery.journal
from edge.delivery import claims
from edge.delivery.journal import Journal
from shared.errors import RequestError

KEY = b"k" * 16
OWN, OTHER = True, False


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path)
    yield journal
    journal.close()


def accept(journal: Journal, id: str = "a", key: bytes = KEY) -> int:
    return journal.accept(
        client="me",
        address="edgelm/reply/me",
        id=id,
        payload_sha256=b"\1" * 32,
        request=b"{}",
        correlation=b"c",
        bundle="debug@0123",
        deadline_s=None,
        claim=key,
        pictures={b"p" * 32: b"file"},
    )


def test_claims_heard_first_wins_and_a_later_one_asks_again(journal: Journal) -> None:
    seq = accept(journal)
    assert journal.unsettled() == [(KEY, seq, b"\1" * 32, b"c")]
    assert journal.settle([(KEY, OWN), (KEY, OTHER), (KEY, OWN)]) == [("won", seq), ("asked again", seq), ("won", seq)]
    assert journal.unsettled() == [] and journal.entry(seq) is not None and not journal.is_taken(KEY)


def test_claims_of_another_that_come_first_delete_the_request(journal: Journal) -> None:
    seq = accept(journal)
    assert journal.settle([(KEY, OTHER), (KEY, OWN), (KEY, OTHER)]) == [("lost", seq), ("noted", None), ("noted", None)]
    assert journal.entry(seq) is None and journal.pictures(seq) == {} and journal.is_taken(KEY)
    with pytest.raises(RequestError, match="another device") as caught:
        accept(journal)
    assert caught.value.retryable and journal.unfinished() == []


def test_claims_survive_the_process(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    seq = accept(journal)
    journal.settle([(b"x" * 16, OTHER)])
    journal.close()
    journal = Journal(tmp_path)
    assert [row[1] for row in journal.unsettled()] == [seq] and journal.is_taken(b"x" * 16)
    journal.win_all()  # it left its pool
    assert journal.unsettled() == []
    journal.close()


def test_claims_of_others_are_kept_two_days_and_own_ones_as_long_as_their_request(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    seq = accept(journal)
    journal.settle([(KEY, OWN), (b"x" * 16, OTHER)])
    journal.record([(seq, b"{}", None)], delivered=[seq])
    now_s = journal._now_s()
    monkeypatch.setattr(journal, "_now_s", lambda: now_s + 1.5 * edge.delivery.journal.KEEP_S)
    journal.prune()
    assert journal.find("me", "edgelm/reply/me", "a") is None and journal.is_taken(b"x" * 16)
    assert journal.settle([(KEY, OTHER)]) == [("noted", None)]  # its answer is gone, and so is the claim to it
    monkeypatch.setattr(journal, "_now_s", lambda: now_s + 2.5 * edge.delivery.journal.KEEP_S)
    journal.prune()
    assert not journal.is_taken(b"x" * 16)


def test_claims_of_others_are_bounded_in_number(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "MAX_FOREIGN", 10)
    seq = accept(journal)
    journal.settle([(bytes([i]) * 16, OTHER) for i in range(50)])
    assert [i for i in range(50) if journal.is_taken(bytes([i]) * 16)] == list(range(40, 50))
    assert journal.settle([(KEY, OWN)]) == [("won", seq)]
