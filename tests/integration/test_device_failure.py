"""A GPU that fails under the daemon: everybody hears of it, nothing is lost, and a new process takes over."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.scheduler import Scheduler
from shared.errors import DeviceError
from shared.messages import GenerateRequest
from tests.integration.harness import Broker, Daemon, Line, Listener, until
from tests.support.emulator import Emulator
from tests.support.mailbox import Mailbox, submit

FAILURE = "cuEventSynchronize failed: CUDA_ERROR_LAUNCH_FAILED"
STORY = {"prompt": "Once upon a time", "steps": 24}
Start = Callable[..., Daemon]


@pytest.fixture
def start(tmp_path: Path, debug_bundle: Path, emulator: Emulator) -> Iterator[Start]:
    """Start a daemon whose GPU makes so many passes; all are stopped at the end."""
    daemons: list[Daemon] = []

    def start(passes: int, *args: str, **settings: Any) -> Daemon:
        program = ("-m", "tests.support.emulator.daemon", emulator.library._name, str(passes))
        daemons.append(Daemon(tmp_path, debug_bundle, *args, program=program, DEVICE="dev", **settings))
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.close()


def last(line: Line) -> dict[str, Any]:
    """The response behind the snapshots."""
    while (reply := line.read() or {})["type"] == "partial":
        pass
    return reply


@pytest.mark.slow
def test_device_failure_is_a_typed_error_and_ends_the_daemon(start: Start) -> None:
    daemon = start(3)
    lines = [daemon.line() for _ in range(3)]
    for i, line in enumerate(lines):
        line.send(STORY | {"id": str(i)})
    for i, line in enumerate(lines):
        answer = last(line)
        assert answer["id"] == str(i)
        assert answer["error"]["code"] == "draining" and answer["error"]["retryable"]
        assert answer["error"]["message"] == "the device has failed, and the daemon starts again"
        assert line.read() is None
    assert daemon.exit_code() == DeviceError.exit_code  # Restart=on-failure
    assert f"only a new start can use it again: {FAILURE}" in daemon.log.read_text()
    assert not daemon.socket.exists()


@pytest.mark.slow
def test_device_failure_is_published_and_accepted_requests_are_answered_after_a_restart(
    start: Start, broker: Broker, listen: Callable[..., Listener]
) -> None:
    listener = listen(broker)
    daemon = start(3, "--mqtt", broker.address)
    until(lambda: "mqtt connected" in daemon.log.read_text(), "the daemon to connect")
    for id in ("a", "b"):
        listener.publish("edgelm/dev/request/generate", STORY | {"id": id, "seed": 1})
    told: dict[str, Any] = {}
    while told.get("state") != "error":
        told = json.loads(listener.next("edgelm/dev/state").payload)
    assert told["failure"] == FAILURE
    metrics = json.loads(listener.next("edgelm/dev/metrics").payload)
    assert metrics["failure"] == FAILURE and metrics["answered"] == {"draining": 2}
    assert listener.next("edgelm/dev/availability").payload == b"offline"
    assert daemon.exit_code() == DeviceError.exit_code

    start(0, "--mqtt", broker.address)
    answers: dict[str, Any] = {}
    while len(answers) < 2:
        message = listener.heard.get(timeout=20)
        if message.topic.startswith("edgelm/dev/response"):
            assert message.topic not in answers, "answered twice"
            answers[message.topic] = json.loads(message.payload)
    assert {answer["status"] for answer in answers.values()} == {"ok"}
    assert len({answer["text"] for answer in answers.values()}) == 1  # one seed, one text, whoever shared its passes


@pytest.mark.slow
def test_device_failure_repeated_by_one_request_gives_it_up(
    start: Start, broker: Broker, listen: Callable[..., Listener]
) -> None:
    """Else it would end every process that takes it up again, for ever."""
    listener = listen(broker)
    daemon = start(1, "--mqtt", broker.address)
    until(lambda: "mqtt connected" in daemon.log.read_text(), "the daemon to connect")
    listener.publish("edgelm/dev/request/generate", STORY | {"id": "a"})
    assert daemon.exit_code() == DeviceError.exit_code
    assert start(1, "--mqtt", broker.address).exit_code() == DeviceError.exit_code
    start(0, "--mqtt", broker.address)
    answer = json.loads(listener.next("edgelm/dev/response/a").payload)
    assert answer["error"]["code"] == "internal" and "ended 2 times" in answer["error"]["message"]


@pytest.mark.slow
def test_device_failure_twice_leaves_the_gpu_alone_until_a_restart(start: Start) -> None:
    for _ in range(2):
        daemon = start(3)
        daemon.line().send(STORY)
        assert daemon.exit_code() == DeviceError.exit_code
    daemon = start(3)
    assert "the daemon died 2 times on the GPU within an hour" in daemon.log.read_text()
    assert daemon.line().ask(STORY)["status"] == "ok"
    health = daemon.line().ask({"type": "health"})
    assert (health["state"], health["backend"]) == ("degraded", "ort")
    assert health["failure"].startswith("the daemon died 2 times on the GPU")
    daemon.signal(signal.SIGTERM)
    assert daemon.exit_code() == 0
    daemon = start(3)
    daemon.line().send(STORY)
    assert daemon.exit_code() == DeviceError.exit_code


def test_device_failure_shows_in_health(debug_bundle: Path) -> None:
    class Broken:
        lengths: tuple[int, ...] = (256,)
        batches: tuple[int, ...] = (1, 2)
        failure: str | None = None

        def advance(self, rows: object, length: int) -> None:
            self.failure = "it burns"
            raise DeviceError("it burns")

        def close(self) -> None:
            """Nothing to free."""

    loaded = LoadedBundle.load(debug_bundle, "fake")
    loaded.backend = Broken()
    scheduler = Scheduler(loaded, queue_size=8)
    failed: list[str | None] = []
    scheduler.on_failure = lambda: failed.append(scheduler.failure)
    told: list[list[int]] = []
    scheduler.watch(lambda tags: told.append(list(tags)))
    mailboxes = [submit(scheduler) for _ in range(4)]
    tagged = Mailbox()
    scheduler.submit(GenerateRequest(prompt="Once"), tagged, commit=lambda plan: 7)
    scheduler.run()
    assert [mailbox.error_code() for mailbox in mailboxes] == ["draining"] * 4 and tagged.error_code() == "draining"
    assert failed == ["it burns"] and not scheduler.busy
    health, metrics = scheduler.health(), scheduler.metrics()
    assert (health.state, health.failure, metrics.failure) == ("error", "it burns", "it burns")
    assert told and told[-1] != [], "what was on the failing device stays noted"
    assert submit(scheduler).error_code() == "draining"
