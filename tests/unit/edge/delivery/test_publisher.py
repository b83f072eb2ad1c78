"""The publisher: how many messages are under way, and what becomes of those that a broker does not take."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.delivery.journal import Journal
from edge.delivery.publisher import MAX_TRIES, WINDOW, Message, Publisher


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path)
    yield journal
    journal.close()


class Broker:
    """Takes messages and numbers them, each connection from one on, as paho does."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.connection = 1

    def send(self, connection: int, message: Message) -> int | None:
        if connection != self.connection:
            return None
        self.sent.append(message)
        return len(self.sent)


def answer(journal: Journal, id: str) -> int:
    seq = journal.accept(
        client="me",
        address=f"edgelm/reply/{id}",
        id=id,
        payload_sha256=b"\1" * 32,
        request=b"{}",
        correlation=None,
        bundle="debug",
        deadline_s=None,
    )
    journal.record(answers=[(seq, b"text", None)])
    return seq


def test_publisher_sends_a_window_at_a_time(journal: Journal) -> None:
    broker = Broker()
    publisher = Publisher(journal, broker.send)
    for i in range(2 * WINDOW):
        publisher.add_answer(answer(journal, str(i)))
    publisher.pump()
    assert broker.sent == []  # there is no connection
    publisher.connected(1, 0xFFFF)
    publisher.pump()
    assert len(broker.sent) == WINDOW
    publisher.acknowledged(1, None)
    publisher.acknowledged(999, None)  # of something else
    publisher.pump()
    assert len(broker.sent) == WINDOW + 1


def test_publisher_gives_up_what_is_refused_again_and_again(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    broker, now = Broker(), time.monotonic()
    publisher = Publisher(journal, broker.send)
    publisher.connected(1, 0xFFFF)
    seq = answer(journal, "a")
    publisher.add_answer(seq)
    for tries in range(MAX_TRIES):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        publisher.pump()
        assert len(broker.sent) == tries + 1
        publisher.acknowledged(tries + 1, "Not authorized")
        publisher.pump()
        assert len(broker.sent) == tries + 1  # later
        journal.record(tried=publisher.outcomes.tried)
        publisher.outcomes.tried.clear()
        now += 3600
    assert publisher.outcomes.given_up == [seq] and publisher.next_s is None


def test_publisher_takes_no_acknowledgement_of_one_connection_for_anothers(journal: Journal) -> None:
    broker = Broker()
    publisher = Publisher(journal, broker.send)
    publisher.connected(1, 0xFFFF)
    numbers = [answer(journal, str(i)) for i in range(3)]
    for seq in numbers:
        publisher.add_answer(seq)
    publisher.pump()
    publisher.lost()
    broker.connection, broker.sent = 2, []
    publisher.pump()
    publisher.acknowledged(1, None)  # the `online` of the new connection
    assert publisher.outcomes.delivered == [] and broker.sent == []
    publisher.connected(2, 0xFFFF)
    publisher.pump()
    assert [message.seq for message in broker.sent] == numbers[:1]  # which of them ended the connection?
    publisher.acknowledged(1, None)
    publisher.pump()
    assert [message.seq for message in broker.sent] == numbers and publisher.outcomes.delivered == numbers[:1]


def test_publisher_blames_a_message_that_was_alone_as_the_connection_broke(journal: Journal) -> None:
    broker = Broker()
    publisher = Publisher(journal, broker.send)
    publisher.connected(1, 0xFFFF)
    poison, other = answer(journal, "poison"), answer(journal, "other")
    publisher.add_answer(poison)
    publisher.pump()
    publisher.add_answer(other)
    publisher.lost()
    assert publisher.outcomes.tried == [poison]
    broker.connection, broker.sent = 2, []
    publisher.connected(2, 0xFFFF)
    publisher.pump()
    assert [message.seq for message in broker.sent] == [other]
