"""`python -m host.bench data`: a generated file, prepared by the real command, measured from outside."""

from argparse import Namespace
from pathlib import Path

import pytest

from host.bench.__main__ import bench_data, write_stories
from host.data.sources import read_texts


def test_write_stories_makes_the_requested_size_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        write_stories(tmp_path / name, 100_000)
    assert (tmp_path / "a.txt").read_bytes() == (tmp_path / "b.txt").read_bytes()
    stories = list(read_texts(tmp_path / "a.txt"))
    assert len(stories) == 1000
    assert all(120 <= len(story.split()) < 260 for story in stories)


def test_bench_data_prints_memory_and_speed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bench_data(Namespace(gigabytes=0.0001))
    figures = capsys.readouterr().out.splitlines()[-1].split()
    assert figures[-1] == "MB"
    assert 50 < int(figures[-2]) < 2000
    assert list(tmp_path.iterdir()) == []
