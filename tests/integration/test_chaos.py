"""A short run of `tests.stress.chaos`; long ones are started by hand."""

import os
import shutil
from pathlib import Path

import pytest

from tests.stress.chaos import Bounds, run
from tests.stress.chaos_report import Journal, Kept, hurried, verdict_of
from tests.support.wall_clock import COMPILER

KEEP_S = 60.0


def journal(*answers: tuple[int, str, bytes, float], now_s: float = 0.0, read_s: float = 0.0) -> Journal:
    """Of rows (number, id, answer, when it was given and delivered)."""
    return Journal(now_s, read_s, {seq: Kept(id, 0.0, answer, at_s, at_s) for seq, id, answer, at_s in answers})


def test_verdict_a_second_answer_counts_until_the_first_was_kept_as_promised() -> None:
    daemon = [
        journal((1, "soon", b"a", 0), (2, "later", b"c", 0)),
        journal((3, "soon", b"b", 59), (4, "later", b"d", 61)),
    ]
    verdict = verdict_of({}, [daemon], KEEP_S)
    assert (verdict.twice, verdict.renewed) == ({"soon"}, {"later"})


def test_verdict_an_answer_that_changes_in_its_place_counts() -> None:
    daemon = [journal((1, "x", b"a", 0)), journal((1, "x", b"b", 600))]
    assert verdict_of({}, [daemon], KEEP_S).twice == {"x"}


def test_verdict_two_daemons_of_one_name_have_an_answer_each_and_no_more() -> None:
    one = [journal((1, "x", b"a", 0), (2, "y", b"a", 0))]
    other = [journal((1, "x", b"b", 1), (2, "y", b"b", 1), (3, "y", b"c", 2))]
    verdict = verdict_of({"x": {b"a": 0.0, b"b": 1.0}}, [one, other], KEEP_S)
    assert verdict.doubled == {"x", "y"} and verdict.twice == {"y"} and not verdict.unstored


def test_verdict_goes_by_the_clients_clock_too() -> None:
    """A journal whose own time is wrong would find nothing wrong."""
    daemon = [journal((1, "x", b"a", 0)), journal((2, "x", b"b", 99))]
    assert verdict_of({"x": {b"a": 0.0, b"b": 20.0}}, [daemon], KEEP_S).twice == {"x"}
    assert verdict_of({"x": {b"a": 0.0, b"b": 70.0}}, [daemon], KEEP_S).twice == set()
    assert hurried([journal(now_s=0, read_s=0), journal(now_s=99, read_s=20)]) == 1
    assert hurried([journal(now_s=0, read_s=0), journal(now_s=20, read_s=20)]) == 0


def test_verdict_an_answer_that_no_journal_held_counts() -> None:
    assert verdict_of({"x": {b"a": 0.0}}, [[journal((1, "y", b"a", 0))]], KEEP_S).unstored == {"x"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mosquitto_pub") is None and "CI" not in os.environ, reason="mosquitto is missing")
def test_chaos_loses_and_repeats_no_answer(debug_bundle: Path) -> None:
    report = run(12, "fake:10", debug_bundle, seed=1, say=print, bounds=Bounds(256 << 10, keep_s=30))
    print(report)
    assert report.broken == 0 and report.requests > 20
    assert sum(report.answers.values()) == report.requests and report.answers["ok"] > report.requests // 2
    assert set(report.misfortunes) >= {"kill daemon", "kill broker", "flood", "correlate", "crowd", "refuse", "double"}
    assert report.vanished_mqtt_clients > 0 and report.memory_peak_mb < 200
    assert COMPILER is None or report.clock_span_days > 0
