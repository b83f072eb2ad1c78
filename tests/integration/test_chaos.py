"""A short run of `tests.chaos`; long ones are started by hand."""

import shutil
from pathlib import Path

import pytest

from tests.chaos import run


@pytest.mark.skipif(shutil.which("mosquitto_pub") is None, reason="mosquitto is not installed")
def test_nothing_accepted_is_lost_or_answered_twice(debug_bundle: Path) -> None:
    report = run(12, "fake:10", debug_bundle, seed=1, say=print)
    print(report)
    assert report.requests > 20 and report.daemon_kills > 0
    assert (report.lost, report.duplicated) == (0, 0)
    assert sum(report.answers.values()) == report.requests and report.answers["ok"] > report.requests // 2
