"""A short run of `tests.stress.chaos`; long ones are started by hand."""

import os
import shutil
from pathlib import Path

import pytest

from tests.stress.chaos import Bounds, run
from tests.support.wall_clock import COMPILER


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mosquitto_pub") is None and "CI" not in os.environ, reason="mosquitto is missing")
def test_nothing_accepted_is_lost_or_answered_twice(debug_bundle: Path) -> None:
    report = run(12, "fake:10", debug_bundle, seed=1, say=print, bounds=Bounds(256 << 10, keep_s=30))
    print(report)
    assert report.broken == 0 and report.requests > 20
    assert sum(report.answers.values()) == report.requests and report.answers["ok"] > report.requests // 2
    assert set(report.misfortunes) >= {"kill daemon", "kill broker", "flood", "correlate", "crowd", "refuse", "double"}
    assert report.vanished_mqtt_clients > 0 and report.memory_peak_mb < 200
    assert COMPILER is None or report.clock_span_days > 0
