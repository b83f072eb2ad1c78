"""What `python -m host.train` cannot use is refused in one sentence, before anything is written."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from host.data.prepare import prepare
from host.data.shards import DATA_FILE
from host.files import locked
from host.train import trainer as train
from host.train.checkpoint import LAST, read_progress
from host.train.logging import LOG_FILE, read_log
from host.train.run_folder import CONFIG_FILE
from shared.errors import DataError
from shared.manifest import sha256_of
from tests.support.commands import call, refusal, small, small_disk


def other_tokenizer(data: Path, tmp_path: Path) -> list[object]:
    text = tmp_path / "other.txt"
    text.write_text("\n\n".join(f"Sam saw {i} birds." for i in range(400)))
    prepare([str(text)], tmp_path / "other", vocab_size=280)
    call(train.main, *small(tmp_path / "other", tmp_path / "theirs", "--steps", 1))
    return ["--init", tmp_path / "theirs"]


def other_shape(data: Path, tmp_path: Path) -> list[object]:
    call(train.main, *small(data, tmp_path / "theirs", "--steps", 1))
    return ["--init", tmp_path / "theirs", "--config", "tiny"]


@pytest.mark.parametrize(
    ("prepare_run", "code", "words"),
    [
        (other_tokenizer, 65, "was trained with another tokenizer than"),
        (other_shape, 78, "--config tiny is another shape than {tmp}/theirs has, debug: leave out --config"),
        (lambda data, tmp: ["--init", tmp / "nowhere"], 65, "nowhere holds no checkpoint: train one with"),
    ],
    ids=["tokenizer", "shape", "missing"],
)
def test_init_weights_that_do_not_fit_are_refused(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prepare_run: Callable[[Path, Path], list[object]],
    code: int,
    words: str,
) -> None:
    flags = prepare_run(data, tmp_path)
    found, sentence = refusal(capsys, train.main, *small(data, tmp_path / "run", "--steps", 1), *flags)
    assert found == code
    assert words.replace("{tmp}", str(tmp_path)) in sentence
    assert not (tmp_path / "run").exists()


def test_init_without_config_takes_the_shape_that_it_names(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(train.main, "--data", data, "--init", trained, "--out", tmp_path, "--steps", 1, "--batch-size", 8)
    assert capsys.readouterr().out.startswith(f"debug from {trained}, 0.")
    assert read_progress(tmp_path / LAST).model == read_progress(trained / LAST).model


def test_run_folder_belongs_to_one_process_at_a_time(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with locked(run, "held twice"):
        code, sentence = refusal(capsys, train.main, "--resume", run, "--steps", 90)
    assert (code, sentence) == (65, f"{run} is in use by another process: wait for it")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    new = tmp_path / "new"
    new.mkdir()
    with locked(new, "held twice"):
        code, sentence = refusal(capsys, train.main, *small(data, new, "--steps", 1))
    assert (code, sentence) == (65, f"{new} is in use by another process: wait for it, or choose another --out")
    assert not list(new.iterdir())


def test_run_folder_is_held_until_its_training_ends(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, refused = tmp_path / "run", []

    def held(trainer: train.Trainer) -> None:
        with pytest.raises(DataError, match="twice"), locked(run, "twice"):
            pass
        refused.append(run)

    monkeypatch.setattr(train.Trainer, "run", held)
    call(train.main, *small(data, run, "--steps", 1))
    assert refused
    with locked(run, "still held"):
        pass


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["--steps", 0], 78, "--steps must be a number above 0, not 0"),
        (["--minutes", -1], 78, "--minutes must be a number above 0, not -1.0"),
        (["--minutes", "nan"], 78, "--minutes must be a number above 0, not nan"),
        (["--batch-size", 0], 78, "--batch-size must be a number above 0, not 0"),
        (["--batch-size", 10**12], 78, f"--batch-size must be at most 65,536, not {10**12}"),
        (["--lr", "inf"], 78, "--lr must be a number above 0, not inf"),
        (["--seed", -1], 78, "--seed must be at least 0 and below 2**63, not -1"),
        (["--seed", 2**63], 78, f"--seed must be at least 0 and below 2**63, not {2**63}"),
        (
            ["--resume", "{trained}", "--lr", 1],
            78,
            "--lr cannot be combined with --resume: only --steps and --minutes may change",
        ),
        (
            ["--resume", "{trained}", "--batch-size", 64],
            78,
            "--batch-size cannot be combined with --resume: only --steps and --minutes may change",
        ),
        (
            ["--objectives", "ar", "--schedule", "linear"],
            78,
            "--schedule needs the objective canvas: it concerns random masks",
        ),
        (
            ["--objectives", "ar,sudoku"],
            78,
            "--objectives: unknown objective 'sudoku': choose among ar, draft, infill, canvas, conditioned, shown",
        ),
        (["--objectives", "ar,ar=2"], 78, "--objectives: ar is given twice"),
        (["--objectives", "ar=much"], 78, "--objectives: the weight of ar must be a number, not 'much'"),
        (["--objectives", "ar=-1"], 78, "--objectives: the weight of ar must be a number above 0, not -1"),
        (
            ["--objectives", "canvas", "--input-noise", 0.1],
            78,
            "--input-noise needs the objective ar: it replaces input tokens",
        ),
        (["--dropout", 1], 78, "--dropout must be at least 0 and below 1, not 1.0"),
        (["--weight-decay", -1], 78, "--weight-decay must be a number of at least 0, not -1.0"),
        (["--cool-down", 2], 78, "--cool-down must be at most 1.0, not 2.0"),
        (
            ["--objectives", "ar,canvas", "--time-input"],
            78,
            "--time-input takes the objective canvas alone: other objectives have no diffusion time",
        ),
        (["--resume", "empty"], 65, "empty holds no checkpoint: train one with `python -m host.train --out empty`"),
        (["--data", "empty"], 65, "empty holds no prepared data: make it with python -m host.data --out empty"),
        (["--data", "{data}", "--out", "full"], 78, "full exists and is no run: choose another --out"),
        (["--data", "{data}", "--out", "full/note"], 78, "full/note exists and is no run: choose another --out"),
        (
            ["--data", "{data}", "--out", "{trained}"],
            78,
            "{trained} already holds a run: continue it with --resume {trained}, or choose another --out",
        ),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, list) else None,
)
def test_settings_that_cannot_be_used_are_refused(
    data: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[object],
    code: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/note").write_text("mine")
    names = {"data": data, "trained": trained}
    arguments = [str(flag).format(**names) for flag in flags]
    assert refusal(capsys, train.main, *arguments) == (code, sentence.format(**names))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]


def test_resume_on_data_with_another_tokenizer_is_refused(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    other_tokenizer(data, tmp_path)
    config = json.loads((run / CONFIG_FILE).read_text())
    (run / CONFIG_FILE).write_text(json.dumps(config | {"data": str(tmp_path / "other")}))
    code, sentence = refusal(capsys, train.main, "--resume", run, "--steps", 90)
    assert (code, sentence) == (
        65,
        f"{tmp_path / 'other'} holds other data than {run} was trained on: prepare it again from that text",
    )


def test_resume_of_a_checkpoint_of_another_tokenizer_is_refused(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    other_tokenizer(data, tmp_path)
    shutil.copyfile(tmp_path / "theirs" / LAST, run / LAST)
    code, sentence = refusal(capsys, train.main, "--resume", run, "--steps", 90)
    assert (code, sentence) == (65, f"{data} has another tokenizer than the run {run}: prepare its data again")


def test_resume_of_a_checkpoint_of_another_optimizer_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = json.loads((run / CONFIG_FILE).read_text())
    (run / CONFIG_FILE).write_text(json.dumps(config | {"optimizer": "adamw"}))
    code, sentence = refusal(capsys, train.main, "--resume", run, "--steps", 90)
    assert code == 65
    assert sentence == f"{run / LAST} does not hold the state of AdamW: it was trained with another optimizer"


def copied(data: Path, trained: Path, folder: Path) -> tuple[Path, Path]:
    """Data to spoil, and the run that is trained on it.  → data folder, run folder"""
    copy, run = folder / "data", folder / "run"
    shutil.copytree(data, copy)
    shutil.copytree(trained, run)
    config = json.loads((run / CONFIG_FILE).read_text())
    (run / CONFIG_FILE).write_text(json.dumps(config | {"data": str(copy)}))
    return copy, run


def test_truncated_shard_stops_a_new_run_and_a_resumed_one(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, run = copied(data, trained, tmp_path)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    shard = copy / "train-00000.bin"
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    for arguments in (["--resume", run, "--steps", 90], small(copy, tmp_path / "new")):
        code, sentence = refusal(capsys, train.main, *arguments)
        assert code == 65
        assert sentence.startswith(f"{shard} has {size - 1} bytes instead of {size}: prepare it again with ")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_altered_shard_stops_a_new_run_and_a_resumed_one(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its size is right, its ids are not words of the vocabulary."""
    copy, run = copied(data, trained, tmp_path)
    shard = copy / "train-00000.bin"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    for arguments in (["--resume", run, "--steps", 90], small(copy, tmp_path / "new")):
        code, sentence = refusal(capsys, train.main, *arguments)
        assert code == 65
        assert sentence.startswith(f"{shard} was altered since it was written: prepare it again with ")
    assert not (tmp_path / "new").exists()


def test_resume_on_another_number_of_stories_is_refused(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a tokenizer that is the same."""
    fewer, run = copied(data, trained, tmp_path)
    shard = fewer / "train-00000.bin"
    os.truncate(shard, shard.stat().st_size // 2)
    meta = json.loads((fewer / DATA_FILE).read_text())
    meta["train"]["shards"][0] |= {"stories": 198, "sha256": sha256_of(shard)}
    (fewer / DATA_FILE).write_text(json.dumps(meta))
    code, sentence = refusal(capsys, train.main, "--resume", run, "--steps", 90)
    assert code == 65
    assert "holds other data than" in sentence


def test_log_line_that_a_full_disk_cut_off_is_dropped(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with (run / LOG_FILE).open("a") as log:
        log.write("6,12")  # of step 61
    call(train.main, "--resume", run, "--steps", 61)
    assert [int(row["step"]) for row in read_log(run / LOG_FILE)] == list(range(1, 62))


def test_log_stays_as_it_was_where_the_disk_has_no_room(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with small_disk(1000):
        code, sentence = refusal(capsys, train.main, "--resume", run)
    assert (code, sentence) == (1, f"the run folder {run} cannot be written: File too large")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "room", "words"),
    [
        (LAST, -100, "the checkpoint {run}/best.safetensors cannot be written: "),
        (LOG_FILE, 60, "the run folder {run} cannot be written: File too large"),
    ],
    ids=["checkpoint", "log"],
)
def test_full_disk_ends_a_run_that_goes_on_when_there_is_room(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, room: int, words: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = (run / LAST).read_bytes()
    with small_disk((run / file).stat().st_size + room):
        code, sentence = refusal(capsys, train.main, "--resume", run, "--steps", 90)
    assert code == 1
    assert sentence.startswith(words.format(run=run))
    assert (run / LAST).read_bytes() == before
    call(train.main, "--resume", run, "--steps", 62)
    assert read_progress(run / LAST).step == 62


@pytest.mark.parametrize("content", [None, b"{", b'{"out": 3}'], ids=["missing", "cut off", "wrongly typed"])
def test_resume_of_a_run_with_damaged_settings_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / CONFIG_FILE).unlink()
    if content is not None:
        (run / CONFIG_FILE).write_bytes(content)
    code, sentence = refusal(capsys, train.main, "--resume", run)
    assert code == 65
    assert sentence.startswith(f"{run / CONFIG_FILE} cannot be read: ")


def test_wandb_without_its_package_says_how_to_install_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what the import system makes of a package that is not there
    found = refusal(capsys, train.main, *small(data, tmp_path / "run", "--wandb"))
    assert found == (78, '--wandb needs its package: pip install "diffusion-llm[wandb]"')
