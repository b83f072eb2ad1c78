"""Messages to the broker: a window of them in flight, each until the broker has acknowledged it.

A refused message is sent again after growing delays, and given up after MAX_TRIES. One that was alone in flight when
the connection broke counts as refused, too: a broker may hang up on a message that it rejects.
"""

import heapq
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from edge.delivery.journal import Journal

log = logging.getLogger(__name__)

WINDOW: Final = 16
"""Messages sent and not yet acknowledged, unless the broker takes fewer at a time."""
MAX_TRIES: Final = 6
RETRY_S: Final = 2.0
"""Delay after the first refusal; four times as long after each further one, 11 minutes in total."""


class MessageTooLargeError(Exception):
    """The broker takes no packet of that size."""


@dataclass(frozen=True)
class Message:
    """A terminal answer, or another reply, to publish at QoS 1.

    seq: the answer's number in the journal; None for other replies. tries: how often the broker refused it. done: for
    replies that are not in the journal; called once it is acknowledged, refused or dropped.
    """

    address: str
    correlation: bytes | None
    payload: bytes
    seq: int | None = None
    tries: int = 0
    done: Callable[[], None] | None = None


@dataclass
class Outcomes:
    """Results of sending answers, by number: see Journal.record."""

    delivered: list[int] = field(default_factory=list)
    tried: list[int] = field(default_factory=list)
    given_up: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.delivered or self.tried or self.given_up)


class Send(Protocol):
    """Hands a message to one connection.

    → the number it will be acknowledged by; None when that connection is gone. Raises MessageTooLargeError.
    """

    def __call__(self, connection: int, message: Message) -> int | None: ...


class Publisher:
    """Sends stored answers, read from the journal as they are sent, and replies that are stored nowhere.

    For one thread. outcomes: for the next transaction of the journal.
    """

    def __init__(self, journal: Journal, send: Send) -> None:
        self.outcomes = Outcomes()
        self._journal = journal
        self._send = send
        self._connection: int | None = None
        self._window = 0
        self._alone = (
            False  # the last connection broke with messages in flight: one at a time shows which of them broke it
        )
        self._answers: deque[int] = deque()
        self._delayed: list[tuple[float, int]] = []  # (when, number), a heap
        self._replies: deque[Message] = deque()
        self._in_flight: dict[int, Message] = {}

    @property
    def idle(self) -> bool:
        """Whether nothing could be sent, or will be acknowledged, on this connection."""
        return not self._in_flight and (self._connection is None or not (self._answers or self._replies))

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None

    @property
    def next_s(self) -> float | None:
        """When the next refused answer is due again, on the monotonic clock."""
        return self._delayed[0][0] if self._delayed else None

    def add_answer(self, seq: int) -> None:
        """An answer was stored."""
        self._answers.append(seq)

    def add_reply(self, message: Message) -> None:
        """Send a reply that is stored nowhere, on this connection only."""
        self._replies.append(message)

    def connected(self, connection: int, window: int) -> None:
        """Start sending. window: how many unacknowledged messages the broker takes."""
        self._connection, self._window = connection, min(window, WINDOW)

    def lost(self) -> None:
        """The connection is gone. Answers are sent again on the next one; replies are not, since their requests are."""
        in_flight, self._in_flight = list(self._in_flight.values()), {}
        self._connection = None
        replies, self._replies = self._replies, deque()
        for message in (*in_flight, *replies):
            if message.done is not None:
                message.done()
        answers = [message for message in in_flight if message.done is None]
        self._alone = bool(in_flight)
        if len(in_flight) == 1 and answers:
            self._refused(answers[0], "the connection broke")
        else:
            self._answers.extendleft(message.seq for message in reversed(answers) if message.seq is not None)

    def acknowledged(self, number: int, refusal: str | None) -> None:
        """The broker took a message, or refused it. Numbers of others' messages are ignored."""
        message = self._in_flight.pop(number, None)
        if message is None:
            return
        self._alone = False
        if refusal is None and message.seq is not None:
            self.outcomes.delivered.append(message.seq)
        if message.done is not None:
            message.done()
        elif refusal is not None:
            self._refused(message, refusal)

    def pump(self) -> None:
        """Send what there is room for: answers first."""
        while self._delayed and self._delayed[0][0] <= time.monotonic():
            self._answers.append(heapq.heappop(self._delayed)[1])
        while self._connection is not None and len(self._in_flight) < (1 if self._alone else self._window):
            if self._answers:
                message = self._read(self._answers.popleft())
            elif self._replies:
                message = self._replies.popleft()
            else:
                return
            if message is not None and not self._hand_on(self._connection, message):
                return

    def _hand_on(self, connection: int, message: Message) -> bool:
        """Send one message.  → whether the connection was there"""
        try:
            number = self._send(connection, message)
        except MessageTooLargeError as error:
            self._drop(message, str(error))
            return True
        if number is not None:
            self._in_flight[number] = message
        elif message.done is None and message.seq is not None:
            self._answers.appendleft(message.seq)
        else:
            self._replies.appendleft(message)
        return number is not None

    def _read(self, seq: int) -> Message | None:
        entry = self._journal.entry(seq)
        if entry is None or entry.answer is None:  # forgotten meanwhile
            return None
        return Message(entry.address, entry.correlation, entry.answer, seq, entry.tries)

    def _refused(self, message: Message, why: str) -> None:
        if message.tries + 1 >= MAX_TRIES:
            self._drop(message, f"refused {MAX_TRIES} times: {why}")
            return
        assert message.seq is not None
        if message.tries == 0:
            log.warning("the broker refuses the answer to %s, which is sent again later: %s", message.address, why)
        self.outcomes.tried.append(message.seq)
        heapq.heappush(self._delayed, (time.monotonic() + RETRY_S * 4**message.tries, message.seq))

    def _drop(self, message: Message, why: str) -> None:
        if message.done is not None:
            message.done()
            return
        assert message.seq is not None
        log.error("giving up the answer to %s, which is sent again only on request: %s", message.address, why)
        self.outcomes.given_up.append(message.seq)
