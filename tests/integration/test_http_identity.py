"""Requests with an id over HTTP: one answer, the same bytes, through hang-ups, crashes and drains."""

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import Broker, Daemon, Listener, until
from tests.integration.http_client import Answer, ask, connect, events

BODY = {"prompt": "Once upon", "max_tokens": 12}
LONG = {"prompt": "Once upon", "decode": "canvas", "steps": 60}


def keyed(daemon: Daemon, key: str, **fields: Any) -> Answer:
    return ask(daemon, "/v1/completions", fields, headers={"Idempotency-Key": key})


def hang_up_on(daemon: Daemon, key: str, **fields: Any) -> None:
    """Send a request, see that it is being computed, and leave."""
    connection = connect(daemon)
    head = {"Content-Type": "application/json", "Idempotency-Key": key}
    connection.request("POST", "/v1/completions", json.dumps(fields), head)
    until(lambda: ask(daemon, "/health").object["state"] == "busy", "the request is accepted")
    connection.close()


def test_identity_same_key_gets_the_same_bytes(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--http", "127.0.0.1:0")
    first, again = keyed(daemon, "a 1", **BODY), keyed(daemon, "a 1", **BODY)
    assert first.status == 200 and first.object["id"] == "cmpl-a 1"
    assert again.body == first.body
    assert ask(daemon, "/v1/completions", BODY | {"id": "a 1"}).error["code"] == "conflict"  # another body, by a field
    assert keyed(daemon, "a 2", **BODY).object["seed"] != first.object["seed"]


def test_identity_other_body_of_a_key_is_a_conflict(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--http", "127.0.0.1:0")
    keyed(daemon, "a", **BODY)
    for other in ({"prompt": "Once"}, BODY | {"stream": True}, BODY | {"user": "b"}):
        answer = keyed(daemon, "a", **other)
        assert (answer.status, answer.error["code"]) == (409, "conflict")


@pytest.mark.parametrize("key", ["", "a/b", "a" * 129, "a+"])
def test_identity_unfit_key_is_refused(start_daemon: Callable[..., Daemon], key: str) -> None:
    answer = keyed(start_daemon("--http", "127.0.0.1:0"), key, **BODY)
    assert answer.status == 400 and "Idempotency-Key" in answer.error["message"]


def test_identity_key_and_id_must_agree(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--http", "127.0.0.1:0")
    assert keyed(daemon, "a", id="a", **BODY).status == 200
    assert keyed(daemon, "a", id="b", **BODY).error["param"] == "id"


def test_identity_a_refusal_by_the_answer_is_repeated(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--http", "127.0.0.1:0", backend="fake:20")
    first, again = (keyed(daemon, "late", deadline_ms=50, **LONG) for _ in range(2))
    assert (first.status, first.error["code"]) == (504, "timeout")
    assert (again.status, again.body) == (first.status, first.body)


def test_identity_two_at_once_share_one_answer(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--http", "127.0.0.1:0", backend="fake:5")
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda: answers.append(keyed(daemon, "b", **LONG))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status for answer in answers] == [200] * 4
    assert len({answer.body for answer in answers}) == 1
    assert "edgelm_requests_accepted_total 1\n" in ask(daemon, "/metrics").body.decode()


def test_identity_streams_of_a_key_add_up_to_one_text(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--http", "127.0.0.1:0")
    texts = []
    for _ in range(2):
        *pieces, (_, done) = events(daemon, id="s", **BODY)
        assert done == "[DONE]"
        texts.append("".join(json.loads(data)["choices"][0]["text"] for _, data in pieces))
    assert texts[0] == texts[1] != ""


def test_identity_hanging_up_loses_nothing(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--http", "127.0.0.1:0", backend="fake:10")
    hang_up_on(daemon, "c", **LONG)
    assert keyed(daemon, "c", **LONG).status == 200
    assert "edgelm_requests_accepted_total 1\n" in ask(daemon, "/metrics").body.decode()


def test_identity_survives_the_process(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--http", "127.0.0.1:0")
    first = keyed(daemon, "d", **BODY)
    daemon.signal(signal.SIGKILL)
    daemon.exit_code()
    assert keyed(start_daemon("--http", "127.0.0.1:0"), "d", **BODY).body == first.body


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_identity_what_was_accepted_is_answered_by_the_next_process(
    start_daemon: Callable[..., Daemon], number: signal.Signals
) -> None:
    daemon = start_daemon("--http", "127.0.0.1:0", backend="fake:100", DRAIN_S="0")
    hang_up_on(daemon, "e", seed=9, **LONG)
    daemon.signal(number)
    daemon.exit_code()
    after = start_daemon("--http", "127.0.0.1:0")
    until(lambda: 'edgelm_requests_ended_total{code="ok"} 1\n' in ask(after, "/metrics").body.decode(), "it is resumed")
    answer = keyed(after, "e", seed=9, **LONG)
    assert answer.status == 200 and answer.object["seed"] == 9


def test_identity_shares_the_journal_with_mqtt_and_tells_nobody_there(
    start_daemon: Callable[..., Daemon], broker: Broker, listen: Callable[..., Listener]
) -> None:
    daemon = start_daemon("--http", "127.0.0.1:0", "--mqtt", broker.address, DEVICE="dev")
    broker.tool("mosquitto_sub", "-t", "edgelm/dev/availability", "-C", "1", "-W", "20")
    listener = listen(broker, "#")
    first, again = keyed(daemon, "f", **BODY), keyed(daemon, "f", **BODY)
    assert first.status == 200 and again.body == first.body
    listener.publish("edgelm/dev/request/generate", {"id": "f", **BODY})  # the same id, of another client
    reply = json.loads(listener.next("edgelm/dev/response/f").payload)
    assert reply["status"] == "ok" and reply["text"] is not None
    assert b"Once upon" not in b"".join(message.payload for message in listener.heard.queue)


def test_identity_drain_answers_what_was_accepted_and_refuses_more(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--http", "127.0.0.1:0", backend="fake:10")
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(ask(daemon, "/v1/completions", LONG)))
    thread.start()
    until(lambda: ask(daemon, "/health").object["state"] == "busy", "the request is accepted")
    daemon.signal(signal.SIGTERM)
    until(lambda: ask(daemon, "/health").status == 503, "it drains")
    late = ask(daemon, "/v1/completions", BODY)
    assert (late.status, late.error["code"], late.headers["x-should-retry"]) == (503, "draining", "true")
    thread.join()
    assert answers[0].status == 200
    assert daemon.exit_code() == 0
    assert "Traceback" not in daemon.log.read_text() and "ERROR" not in daemon.log.read_text()


@pytest.mark.slow
def test_identity_a_state_folder_of_another_daemon_is_named(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    start_daemon("--http", "127.0.0.1:0")
    with pytest.raises(AssertionError, match="is used by another daemon"):
        start_daemon("--http", "127.0.0.1:0", "--socket", str(tmp_path / "other"))
