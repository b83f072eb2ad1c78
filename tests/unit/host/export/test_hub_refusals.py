"""What `host.export --hf` and `host.train --init` cannot use is refused in one sentence, before the work."""

import json
import shutil
from pathlib import Path

import pytest

from host.data.prepare import prepare
from host.export import __main__ as export
from host.train import trainer as train
from host.train.published import CONFIG, WEIGHTS
from tests.support.commands import refusal, small, small_disk


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--hf", "{tmp}/text"], "{tmp}/text exists and is not what --hf writes: choose another folder"),
        (["--hf", "{tmp}/text/below/hub"], "{tmp}/text/below/hub cannot be written: Not a directory"),
        (["--hf", "{tmp}/hub", "--run", "{trained}"], "{trained} did not learn the objective ar, by which a published"),
        (["--hf", "{tmp}/hub", "--untrained", "debug"], "--hf publishes a trained network: not with --untrained"),
        (["--hf-dtype", "float16"], "--hf-dtype needs --hf OUT"),
        (["--hf-figures", "{tmp}"], "--hf-figures needs --hf OUT"),
        (["--hf", "{tmp}/hub", "--hf-figures", "{tmp}/nowhere"], "{tmp}/nowhere is not a bundle"),
        (["--hf", "{tmp}/hub", "--hf-figures", "{tmp}", "--int8"], "--hf-figures says where the figures are"),
    ],
)
def test_hub_export_says_before_the_work_what_it_cannot(
    joint_runs: tuple[Path, Path],
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    sentence: str,
) -> None:
    (tmp_path / "text").write_text("a file")
    given = [flag.format(tmp=tmp_path, trained=trained) for flag in flags]
    if not {"--run", "--untrained"}.intersection(given):
        given += ["--run", str(joint_runs[1])]
    _, said = refusal(capsys, export.main, *given)
    assert said.startswith(sentence.format(tmp=tmp_path, trained=trained)), said
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def another_kind(folder: Path) -> str:
    (folder / CONFIG).write_text(json.dumps({"model_type": "gpt2", "n_embd": 64}))
    return f"{folder} holds a model of type 'gpt2', none that host.export --hf wrote"


def without_training(folder: Path) -> str:
    config = json.loads((folder / CONFIG).read_text())
    del config["training"]["stages"]
    (folder / CONFIG).write_text(json.dumps(config))
    return f"{folder / CONFIG} is not what host.export --hf wrote: Object missing required field `stages`"


def cut_off(folder: Path) -> str:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    return f"{folder / WEIGHTS} cannot be read: "


def no_config(folder: Path) -> str:
    (folder / CONFIG).unlink()
    return f"{folder / CONFIG} cannot be read: No such file or directory"


@pytest.mark.parametrize("spoil", [another_kind, without_training, cut_off, no_config])
def test_init_from_a_folder_that_is_no_such_model_is_refused(
    data: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: object
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(published, folder)
    expected = spoil(folder)  # type: ignore[operator]
    flags = small(data, tmp_path / "run", "--objectives", "ar", "--steps", 1, "--init", folder)
    code, sentence = refusal(capsys, train.main, *flags)
    assert (code, sentence[: len(expected)]) == (65, expected)
    assert not (tmp_path / "run").exists()


def test_init_from_a_folder_of_another_tokenizer_is_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.txt").write_text("\n\n".join(f"Sam saw {i} birds." for i in range(400)))
    prepare([str(tmp_path / "other.txt")], tmp_path / "other", vocab_size=300)
    flags = small(tmp_path / "other", tmp_path / "run", "--objectives", "ar", "--steps", 1, "--init", published)
    code, sentence = refusal(capsys, train.main, *flags)
    assert (code, sentence) == (65, f"{published} was trained with another tokenizer than {tmp_path / 'other'}")


def test_published_folder_cannot_be_resumed_and_names_no_data(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, sentence = refusal(capsys, train.main, "--resume", published)
    assert code == 65 and sentence.endswith(f"start a run from it with --init {published}")
    code, sentence = refusal(capsys, export.main, "--run", published, "--out", tmp_path / "bundle")
    assert code == 65 and sentence.endswith("name text files with --source")


def test_hub_export_on_a_full_disk_keeps_the_old_folder(
    joint_runs: tuple[Path, Path], published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder"
    shutil.copytree(published, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with small_disk(100_000):
        _, sentence = refusal(capsys, export.main, "--run", joint_runs[1], "--hf", out, "--stories", 4)
    assert sentence.startswith(f"{out} cannot be written: ")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
