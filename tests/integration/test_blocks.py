"""Blocks over the real daemon: requests of every shape, places given back, and the same text after a kill."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from edge.decoding.blocks import SLOTS
from shared.messages import MAX_SEGMENTS
from tests.integration.harness import Broker, Daemon, Line, Listener, until

CANVAS: Final = 256  # of the debug configuration


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, blocks_bundle: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("daemon"), blocks_bundle, "--backend", "ort")
    yield daemon
    daemon.close()


def gap(size: int | None) -> dict[str, int | None]:
    return {"gap": size}


SHAPES: Final[dict[str, dict[str, Any]]] = {
    "gap first": {"segments": [gap(5), " b"]},
    "gap last": {"segments": ["a ", gap(5)]},
    "adjacent gaps": {"segments": ["a ", gap(3), gap(None), " b"]},
    "gap to the end": {"segments": ["a", gap(CANVAS - 2)]},
    "gap that is all": {"segments": [gap(CANVAS - 1)]},
    "gap of no size": {"segments": ["a ", gap(None), " b"]},
    "most gaps": {"segments": ["a", gap(3)] * (MAX_SEGMENTS // 2)},
    "one token": {"prompt": "a", "max_tokens": 1},
    "empty prompt": {"prompt": ""},
    "one position left": {"prompt": "\x01" * (CANVAS - 2)},
    "no heat": {"prompt": "a", "temperature": 0},
    "hardly any heat": {"prompt": "a", "temperature": 1e-9},
    "heat": {"prompt": "a", "temperature": 10},
    "one candidate": {"prompt": "a", "top_k": 1},
    "hardly any mass": {"prompt": "a", "top_p": 5e-324},
    "no window": {"prompt": "a", "window": 0},
    "largest seed": {"prompt": "a", "seed": 2**63 - 1},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_blocks_request_of_any_shape_is_answered_alike_streamed_or_not(daemon: Daemon, shape: dict[str, Any]) -> None:
    line, request = daemon.line(), {"seed": 3} | shape
    whole = line.ask(request)
    assert whole["status"] == "ok", whole
    for given in (part for part in shape.get("segments", [shape.get("prompt")]) if isinstance(part, str)):
        assert given in whole["text"]
    line.send(request | {"stream": True})
    grown = shape.get("prompt", "")
    while (reply := line.read()) is not None and reply["type"] == "partial":
        if "prompt" in shape:
            grown += reply["appended"]
            assert "░" not in reply["text"]
    assert reply is not None and (reply["text"], reply["usage"]) == (whole["text"], whole["usage"])
    assert "prompt" not in shape or whole["text"].startswith(grown)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": "a", "window": 4}, "`window` 4 is above the bundle's 3"),
        ({"prompt": "a", "window": 1, "steps": 2}, "give one of them"),
        ({"prompt": "a", "decode": "canvas", "window": 1}, "leave it out, or `decode`"),
        ({"prompt": "a", "decode": "blocks", "selection": "random"}, "leave it out, or `decode`"),
        ({"segments": ["a", {"gap": 0}]}, "`segments[1].gap` must be an integer"),
    ],
)
def test_blocks_request_that_contradicts_itself_is_refused(
    daemon: Daemon, request_: dict[str, Any], message: str
) -> None:
    error = daemon.line().ask(request_)["error"]
    assert error["code"] == "bad_request" and message in error["message"]


def test_blocks_requests_given_up_return_their_slots(start_daemon: Callable[..., Daemon], blocks_bundle: Path) -> None:
    daemon = start_daemon("--bundle", str(blocks_bundle), backend="fake:20")
    long = {"prompt": "a", "max_tokens": 200, "window": 0}

    def crowd(**more: int) -> list[Line]:
        lines = [daemon.line() for _ in range(SLOTS)]
        for line in lines:
            line.send(long | {"id": "x"} | more)
        return lines

    short = {"prompt": "a", "decode": "canvas", "max_tokens": 1}
    hung_up = crowd()
    assert daemon.line().ask(short)["status"] == "ok"  # so the others are under way
    for line in hung_up:
        line.close()
    assert [(line.read() or {})["error"]["code"] for line in crowd(deadline_ms=100)] == ["timeout"] * SLOTS
    cancelled = crowd()
    assert daemon.line().ask(short)["status"] == "ok"
    for line in cancelled:
        line.send({"type": "cancel", "id": "x"})
        assert (line.read() or {})["status"] == "cancelled"
    assert [(line.read() or {})["status"] for line in crowd(max_tokens=2, deadline_ms=10_000)] == ["ok"] * SLOTS


@pytest.mark.slow
def test_blocks_text_after_a_kill_is_the_one_of_its_seed(
    start_daemon: Callable[..., Daemon], blocks_bundle: Path, broker: Broker, listen: Callable[..., Listener]
) -> None:
    def start(backend: str) -> Daemon:
        return start_daemon("--mqtt", broker.address, "--bundle", str(blocks_bundle), backend=backend, DEVICE="dev")

    listener, killed = listen(broker), start("fake:20")
    until(lambda: "mqtt connected" in killed.log.read_text(), "the daemon to connect")
    request = {"segments": ["a ", gap(20), " b ", gap(None), "."], "window": 1}
    listener.publish("edgelm/dev/request/generate", request | {"id": "k", "stream": True})
    listener.next("edgelm/dev/stream/k")
    killed.signal(signal.SIGKILL)
    killed.exit_code()
    daemon = start("fake")
    answer = json.loads(listener.next("edgelm/dev/response/k").payload)
    assert answer["status"] == "ok"
    again = daemon.line().ask(request | {"seed": answer["seed"]})
    assert (again["text"], again["usage"]) == (answer["text"], answer["usage"])
