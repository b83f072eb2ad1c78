"""What a daemon is like after much work, too much work, and nonsense."""

import threading
from collections.abc import Callable

from tests.integration.harness import Daemon, Line
from tests.soak import fuzz, resources, soak

StartDaemon = Callable[..., Daemon]


def test_memory_and_descriptors_stay_as_they_are(start_daemon: StartDaemon) -> None:
    before, after = soak(start_daemon(), settle=100, requests=1500)
    print(before, after)
    assert after.descriptors <= before.descriptors + 1  # the last connection but one may not be closed yet
    assert after.resident_kb <= before.resident_kb * 1.02


def test_no_input_ends_the_daemon_or_goes_without_a_code(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    counts = fuzz(daemon, inputs=3000, seed=1)
    print(counts)
    assert counts.total() > 2500 and counts["bad_request"] > 100 and counts["ok"] > 10
    assert daemon.line().ask({"prompt": "x", "max_tokens": 1})["status"] == "ok"
    assert "Traceback" not in daemon.log.read_text()


def test_overload_is_refused_with_advice_and_passes(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(backend="fake:5")
    codes: list[str] = []

    def client() -> None:
        line = Line(daemon.socket)
        line.send(*({"prompt": "Once", "steps": 8, "id": str(i)} for i in range(40)))
        for _ in range(40):
            reply = line.read() or {}
            codes.append(reply["error"]["code"] if reply["error"] else "ok")
            assert codes[-1] != "queue_full" or reply["error"]["retry_after_ms"] >= 1
        line.close()

    clients = [threading.Thread(target=client) for _ in range(10)]
    before = resources(daemon)
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert len(codes) == 400 and set(codes) == {"ok", "queue_full"} and codes.count("ok") >= 33
    assert resources(daemon).resident_kb <= before.resident_kb + 8 * 1024
    assert daemon.line().ask({"prompt": "x", "max_tokens": 1})["status"] == "ok"
