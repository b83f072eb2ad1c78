"""A run meets only the tokenizer and the data that it was trained on: figures from others would be wrong in silence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from host import generate
from host.data.prepare import prepare
from host.evaluate import __main__ as evaluate
from host.experiments import compare
from host.export import __main__ as export
from host.train import trainer as train
from host.train.checkpoint import LAST, read_progress
from host.train.run_folder import CONFIG_FILE
from shared.manifest import TOKENIZER
from tests.support.commands import call, refusal, small


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A data folder of other text, with a vocabulary as large as that of `data`."""
    text = tmp_path / "other.txt"
    text.write_text("\n\n".join(f"Sam saw {i} birds by the {'river' * (i % 3)} side." for i in range(400)))
    prepare([str(text)], tmp_path / "other", vocab_size=300)
    return tmp_path / "other"


def test_data_prepared_elsewhere_from_the_same_text_are_the_same(
    corpus: Path, data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(corpus, tmp_path / "copy")
    prepare([str(tmp_path / "copy")], tmp_path / "again", vocab_size=300)
    config = json.loads((run / CONFIG_FILE).read_text())
    (run / CONFIG_FILE).write_text(json.dumps(config | {"data": str(tmp_path / "again")}))
    call(compare.main, f"a={run}", "--out", tmp_path / "compare.png")
    assert "| a | " in capsys.readouterr().out


def test_data_of_other_text_with_a_run_s_tokenizer_continue_it(trained: Path, tmp_path: Path) -> None:
    text = tmp_path / "other.txt"
    text.write_text("\n\n".join(f"Sam saw {i} birds." for i in range(400)))
    prepare([str(text)], tmp_path / "other", tokenizer_of=trained)
    call(train.main, *small(tmp_path / "other", tmp_path / "next", "--steps", 2, "--init", trained))
    assert read_progress(tmp_path / "next" / LAST).step == 2


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained`, to be spoilt."""
    return shutil.copytree(trained, tmp_path / "run")


READERS: list[tuple[Callable[[], None], list[object]]] = [
    (evaluate.main, ["--run", "{run}", "--draws", 1]),
    (export.main, ["--run", "{run}", "--out", "{run}-bundle"]),
]
OF_DATA: list[tuple[Callable[[], None], list[object]]] = [
    *READERS,
    (compare.main, ["a={run}", "b={run}"]),
    (train.main, ["--resume", "{run}", "--steps", 90]),
]


@pytest.mark.parametrize(
    ("main", "flags"), [*READERS, (generate.main, ["Tom", "--run", "{run}"])], ids=["evaluate", "export", "generate"]
)
@pytest.mark.parametrize("spoil", ["replaced", "missing"])
def test_load_run_refuses_another_tokenizer_in_the_run_folder(
    run: Path,
    other: Path,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[], None],
    flags: list[object],
    spoil: str,
) -> None:
    (run / TOKENIZER).unlink()
    if spoil == "replaced":
        shutil.copyfile(other / TOKENIZER, run / TOKENIZER)
    code, sentence = refusal(capsys, main, *(str(flag).format(run=run) for flag in flags))
    assert (code, sentence) == (65, f"{run / TOKENIZER} is missing, or not the tokenizer that the run was trained with")
    assert not Path(f"{run}-bundle").exists()


@pytest.mark.parametrize(("main", "flags"), OF_DATA, ids=["evaluate", "export", "compare", "train"])
def test_data_of_a_run_prepared_again_from_other_text_are_refused(
    run: Path, other: Path, capsys: pytest.CaptureFixture[str], main: Callable[[], None], flags: list[object]
) -> None:
    config = json.loads((run / CONFIG_FILE).read_text())
    (run / CONFIG_FILE).write_text(json.dumps(config | {"data": str(other)}))
    code, sentence = refusal(capsys, main, *(str(flag).format(run=run) for flag in flags))
    assert (code, sentence) == (
        65,
        f"{other} holds other data than {run} was trained on: prepare it again from that text",
    )
