"""A short run of `tests.stress.chaos`; long ones are started by hand."""

import os
import shutil
from pathlib import Path

import pytest

from tests.stress.chaos import run


@pytest.mark.skipif(shutil.which("mosquitto_pub") is None and "CI" not in os.environ, reason="mosquitto is missing")
def test_nothing_accepted_is_lost_or_answered_twice(debug_bundle: Path) -> None:
    report = run(12, "fake:10", debug_bundle, seed=1, say=print)
    print(report)
    assert report.broken == 0 and report.requests > 20
    assert sum(report.answers.values()) == report.requests and report.answers["ok"] > report.requests // 2
    assert report.daemon_kills > 0 and report.broker_kills > 0 and report.vanished_mqtt_clients > 0
    assert report.clock_jumps is None or (report.clock_jumps > 0 and report.clock_span_days > 0)
