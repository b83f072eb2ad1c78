"""Conditions where held-out stories show few of the pictures: what none of them has is left out of the figures."""

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from host.data.prepare import main as prepare_main
from host.evaluate import __main__ as evaluate
from host.evaluate.conditions import ConditionFigures
from host.export import __main__ as export
from host.train.run_folder import CONFIG_FILE
from shared.manifest import read_manifest
from tests.support.commands import call

STYLE = "pictures, trained styles"


@pytest.fixture
def cake_run(runs: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    """A run whose pictures show cake alone, of which one held-out story tells."""
    folder, prepared, run = tmp_path / "own", tmp_path / "pictures", tmp_path / "cake"
    folder.mkdir()
    Image.new("RGB", (64, 64), "pink").save(folder / "cake.png")
    (folder / "all.jsonl").write_text(json.dumps({"image": "cake.png", "words": ["cake"], "style": "photo"}))
    call(prepare_main, "--pictures", folder, "--out", prepared)
    shutil.copytree(runs[2], run)
    config = json.loads((run / CONFIG_FILE).read_text())
    (run / CONFIG_FILE).write_text(json.dumps({**config, "pictures": str(prepared)}))
    return run


@pytest.mark.slow
def test_conditions_that_no_story_has_are_left_out(
    cake_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--conditions", "--stories", 4, "--count", 2, "--guidance", 1]
    missing = [
        f"left out: no story of stories, valid split has {n} {STYLE}; more --stories may have some" for n in (2, 3)
    ]
    bundle = tmp_path / "b"
    call(export.main, "--run", cake_run, "--out", bundle, "--target", "cpu", "--stories", 4)
    conditions = read_manifest(bundle).conditions
    assert conditions is not None
    assert [(one.given, one.number) for one in conditions.asked_for] == [("words", 1), (STYLE, 1)]
    assert [law.given for law in conditions.laws] == ["1 word"]  # one story has no other story's picture
    for flags in (["--run", cake_run], ["--bundle", bundle, "--scorer", cake_run]):
        capsys.readouterr()
        call(evaluate.main, *flags, *asked)
        assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")] == missing
        call(evaluate.main, *flags, *asked, "--json")
        found = msgspec.json.decode(capsys.readouterr().out.splitlines()[-1], type=ConditionFigures)
        told = {(one.asked.given, one.asked.number) for one in found.told}
        assert told == {("words", 1), ("words", 2), ("words", 3), (STYLE, 1)} and found.left_out == missing
