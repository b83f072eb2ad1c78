"""The Unix socket of a real daemon: what comes back for what is sent."""

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from edge.serving.job import EARLY_SNAPSHOTS
from shared.messages import MAX_MESSAGE_BYTES
from tests.integration.harness import Daemon, Line, until

STORY = {"prompt": "Once upon a time", "seed": 7}


@pytest.fixture
def line(shared_daemon: Daemon) -> Line:
    return shared_daemon.line()


def test_socket_response_has_every_field(line: Line, shared_daemon: Daemon) -> None:
    reply = line.ask(STORY | {"id": "a", "max_tokens": 9, "steps": 3})

    assert reply["type"] == "response" and reply["v"] == 1 and reply["id"] == "a" and reply["status"] == "ok"
    assert reply["text"].startswith("Once upon a time")
    assert reply["seed"] == 7
    assert reply["usage"]["steps"] == 3
    assert 0 < reply["usage"]["generated_tokens"] <= 9
    timing = reply["timing"]
    assert 0 <= timing["queue_ms"] < timing["first_token_ms"] < timing["total_ms"]
    assert reply["model"] in shared_daemon.ready  # NAME@DIGEST, as the daemon announced it


def test_socket_response_seed_repeats_the_text(line: Line) -> None:
    first = line.ask({"prompt": "Once"})
    assert line.ask({"prompt": "Once", "seed": first["seed"]})["text"] == first["text"]
    assert line.ask({"prompt": "Once"})["seed"] != first["seed"]


def test_socket_infill_fills_gaps_between_the_given_texts(line: Line) -> None:
    reply = line.ask({"segments": ["Tom had a ", {"gap": 4}, " and it was ", {"gap": 3}, "."]})
    assert reply["text"].startswith("Tom had a ") and " and it was " in reply["text"] and reply["text"].endswith(".")
    assert reply["usage"]["generated_tokens"] == 7


def test_socket_requests_in_flight_are_told_apart_by_id(line: Line) -> None:
    line.send(*({"prompt": "Once", "id": str(i), "max_tokens": 3} for i in range(5)))
    assert sorted((line.read() or {})["id"] for _ in range(5)) == ["0", "1", "2", "3", "4"]  # in any order: lanes


BAD_LINES: dict[str, tuple[bytes, str, str]] = {
    "no JSON": (b"Once upon a time", "bad_request", "malformed"),
    "no object": (b'["prompt"]', "bad_request", "object"),
    "not UTF-8": (b'{"prompt": "\xff"}', "bad_request", ""),
    "unknown field": (b'{"prompt": "x", "promt": "y"}', "bad_request", "promt"),
    "wrong type": (b'{"prompt": "x", "steps": "many"}', "bad_request", "steps"),
    "unknown message": (b'{"type": "summarise"}', "bad_request", "summarise"),
    "out of bounds": (b'{"prompt": "x", "temperature": -1}', "bad_request", "temperature"),
    "nothing asked": (b"{}", "bad_request", "prompt"),
    "no gap": (b'{"segments": ["x"]}', "bad_request", "gap"),
    "gap too long": (b'{"segments": ["x", {"gap": 999}]}', "too_large", "fit"),
    "prompt too long": (b'{"prompt": "' + b"time " * 2000 + b'"}', "too_large", "fit"),
    "MQTT's field": (b'{"prompt": "x", "response_topic": "edgelm/y"}', "bad_request", "response_topic"),
    "deeply nested": (b'{"prompt": ' + b"[" * 5000, "bad_request", ""),
}


@pytest.mark.parametrize(("sent", "code", "named"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_socket_bad_line_gets_one_sentence_and_the_next_is_served(
    line: Line, sent: bytes, code: str, named: str
) -> None:
    reply = line.ask(sent)

    assert reply["status"] == "error" and reply["error"]["code"] == code
    assert named in reply["error"]["message"]
    assert line.ask({"prompt": "x", "max_tokens": 1})["status"] == "ok"


def test_socket_bad_request_is_answered_under_its_id(line: Line) -> None:
    assert line.ask({"id": "mine", "prompt": "x", "promt": "y"})["id"] == "mine"


def test_socket_empty_lines_are_ignored(line: Line) -> None:
    assert line.ask(b"\n  \n" + b'{"prompt": "x", "max_tokens": 1}')["status"] == "ok"


@pytest.mark.parametrize("end", [b"\n", b""], ids=["with its end", "without end"])
def test_socket_line_that_is_too_long_ends_the_connection(line: Line, end: bytes) -> None:
    line.sock.sendall(b"x" * (MAX_MESSAGE_BYTES + 1) + end)

    assert (line.read() or {})["error"]["code"] == "too_large"
    assert line.read() is None


def test_socket_last_line_needs_no_newline_at_end_of_stream(line: Line) -> None:
    line.sock.sendall(b'{"prompt": "x", "max_tokens": 2}')
    line.sock.shutdown(socket.SHUT_WR)

    assert (line.read() or {})["status"] == "ok"
    assert line.read() is None


def test_socket_health_has_state_and_model(line: Line, shared_daemon: Daemon) -> None:
    health = line.ask({"type": "health"})
    assert (health["state"], health["queued"]) == ("idle", 0)
    assert health["model"] in shared_daemon.ready


def test_socket_client_that_does_not_read_delays_no_other(shared_daemon: Daemon, line: Line) -> None:
    deaf = shared_daemon.line()
    deaf.sock.setblocking(False)
    junk = b"{}\n" * 1000
    with pytest.raises(BlockingIOError):  # the daemon stops reading what it cannot answer
        for _ in range(10_000):
            deaf.sock.sendall(junk)

    assert line.ask({"prompt": "x", "max_tokens": 1})["status"] == "ok"


def slow_daemon(start_daemon: Callable[..., Daemon], **settings: str) -> Daemon:
    """A step takes 20 ms, a whole canvas more than a second."""
    return start_daemon(backend="fake:20", **settings)


def is_busy(daemon: Daemon) -> bool:
    line = Line(daemon.socket)
    busy = bool(line.ask({"type": "health"})["state"] == "busy")
    line.close()
    return busy


def test_socket_snapshots_come_at_a_bounded_rate(start_daemon: Callable[..., Daemon]) -> None:
    line = slow_daemon(start_daemon).line()
    line.send(STORY | {"id": "s", "stream": True, "steps": 40})
    started_s = time.monotonic()
    partials: list[dict[str, Any]] = []
    while (reply := line.read() or {})["type"] == "partial":
        partials.append(reply)
    seconds = time.monotonic() - started_s

    assert 2 <= len(partials) <= EARLY_SNAPSHOTS + 2 + 30 * seconds
    assert [p["seq"] for p in partials] == list(range(1, len(partials) + 1))
    open_positions = [p["masked"] for p in partials]
    assert open_positions == sorted(open_positions, reverse=True)
    for partial in partials:
        assert partial["id"] == "s" and partial["steps"] == 40
        assert partial["text"].startswith("Once upon a time") and partial["text"].count("░") == partial["masked"]
        assert partial["parts"][0]["text"].startswith("Once upon a time") and "draft" not in partial["parts"][0]
        assert any(part.get("draft") for part in partial["parts"])
    assert reply["status"] == "ok" and reply["usage"]["steps"] == 40


def test_socket_hangup_stops_the_requests_of_the_client(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(backend="fake:50")  # the whole story would take three seconds
    gone, waiting = Line(daemon.socket), daemon.line()
    gone.send(STORY, STORY)
    until(lambda: is_busy(daemon), "the story to begin")
    gone.close()

    reply = waiting.ask({"prompt": "x", "max_tokens": 1})
    assert reply["status"] == "ok" and reply["timing"]["queue_ms"] < 1000


def test_socket_deadline_counts_from_acceptance(start_daemon: Callable[..., Daemon]) -> None:
    line = slow_daemon(start_daemon).line()
    line.send(STORY | {"id": "first"}, STORY | {"id": "waiting", "deadline_ms": 100})

    reply = line.read() or {}
    assert reply["id"] == "waiting" and reply["error"]["code"] == "timeout"
    assert "retryable" not in reply["error"]
    assert (line.read() or {})["status"] == "ok"


def test_socket_full_queue_says_when_to_retry(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(backend="fake:200", QUEUE_SIZE="1")
    line = daemon.line()
    line.send(STORY | {"id": "running"})
    until(lambda: is_busy(daemon), "the story to begin")
    line.send(STORY | {"id": "waiting"}, STORY | {"id": "refused"})

    refused = line.read() or {}
    assert refused["id"] == "refused" and refused["error"]["code"] == "queue_full"
    assert refused["error"]["retryable"] and refused["error"]["retry_after_ms"] >= 1


def test_socket_health_is_answered_during_a_step(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(backend="fake:3000")
    busy, asking = daemon.line(), daemon.line()
    busy.send(STORY | {"steps": 1})
    until(lambda: is_busy(daemon), "the step to begin")
    started_s = time.monotonic()
    for _ in range(50):
        assert asking.ask({"type": "health"})["state"] == "busy"  # all within the one step
    assert time.monotonic() - started_s < 50 * 0.05
    busy.close()


def test_socket_cancel_stops_the_connections_own_request_of_that_id(start_daemon: Callable[..., Daemon]) -> None:
    daemon = slow_daemon(start_daemon)
    mine, other = daemon.line(), daemon.line()
    mine.send(STORY | {"id": "a"}, STORY | {"id": "b", "steps": 5})
    other.send(STORY | {"id": "a", "steps": 5})
    mine.send({"type": "cancel", "id": "a"})

    cancelled = mine.read() or {}
    assert (cancelled["id"], cancelled["status"], cancelled["error"]["code"]) == ("a", "cancelled", "cancelled")
    assert (mine.read() or {})["status"] == (other.read() or {})["status"] == "ok"
