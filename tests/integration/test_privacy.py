"""What people ask for, and what they get, is nobody else's business: the log holds none of it."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.integration.harness import Broker, Daemon, Listener, until

SECRET = "swordfish"
REQUEST = "edgelm/dev/request/generate"


def test_privacy_log_holds_no_prompt_however_a_request_ends(
    start_daemon: Callable[..., Daemon], broker: Broker, listen: Callable[..., Listener], tmp_path: Path
) -> None:
    daemon = start_daemon("--mqtt", broker.address, backend="fake:5", DEVICE="dev", QUEUE_SIZE="1")
    until(lambda: "mqtt connected" in daemon.log.read_text(), "the connection")
    listener, line = listen(broker, "edgelm/#"), daemon.line()
    valid = {"prompt": SECRET, "steps": 2}
    bad = json.dumps(valid | {SECRET: 1}).encode()
    ends: set[str] = set()

    def end(answer: dict[str, object] | None) -> None:
        assert answer is not None
        error = answer["error"]
        ends.add(error["code"] if isinstance(error, dict) else "ok")

    for message in (valid, bad, SECRET.encode(), valid | {"steps": 900, "deadline_ms": 20}, valid | {"steps": SECRET}):
        end(line.ask(message))
    line.send(*[valid | {"steps": 50}] * 5)
    for _ in range(5):
        end(line.read())
    end(line.ask(b'{"prompt": "' + SECRET.encode() * 10_000 + b'"}'))

    # As text, with an id, once more with it, with another payload, too long, not UTF-8, to a topic that is refused.
    long = SECRET.encode() * 10_000
    for number, payload in enumerate((SECRET.encode(), bad, long, SECRET.encode() + b"\xff")):
        listener.publish(REQUEST, payload, ResponseTopic=f"edgelm/reply/{number}")
        end(json.loads(listener.next(f"edgelm/reply/{number}").payload))
    for request in (valid, valid, valid | {"prompt": f"{SECRET}!"}):
        listener.publish(REQUEST, request | {"id": "a"})
        end(json.loads(listener.next("edgelm/dev/response/a").payload))
    listener.publish(REQUEST, valid | {"id": "b"}, ResponseTopic="elsewhere/b")
    end(json.loads(listener.next("edgelm/dev/response/b").payload))
    listener.publish(REQUEST, valid, retain=True)
    daemon.close()

    assert {"ok", "bad_request", "timeout", "queue_full", "too_large", "conflict", "bad_reply_topic"} <= ends
    log = daemon.log.read_text()
    assert "mqtt connected" in log and SECRET not in log
    for path in tmp_path.rglob("*"):  # but for the journal, which is its owner's alone
        if path.is_file() and SECRET.encode() in path.read_bytes():
            assert path.name.startswith("journal.") and path.stat().st_mode & 0o077 == 0
