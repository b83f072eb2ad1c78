"""`python -m host.data`: stories in, a data folder out, whole or not at all."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from host.data.prepare import prepare
from host.data.shards import DATA_FILE, load_data
from host.data.tokenizer import encode_stories, load_tokenizer
from host.files import swapped_in
from shared.errors import ConfigError, DataError, DiffusionLLMError
from shared.tokens import SPECIAL_TOKENS

REPOSITORY = Path(__file__).parents[4]
STORIES = [f"Once upon a time, Tom had {i} balls. He said: <MASK>!" for i in range(250)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "stories.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in STORIES).encode()))
    return path


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def start(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "host.data", *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_every_story_becomes_its_canvas_and_every_hundredth_is_held_out(source: Path, tmp_path: Path) -> None:
    prepare(str(source), tmp_path / "out", vocab_size=300)
    data = load_data(tmp_path / "out", verify=True)
    tokenizer = load_tokenizer(data.tokenizer_path)
    held_out = STORIES[::100]
    train = [text for text in STORIES if text not in held_out]
    for split, texts in ((data.train, train), (data.valid, held_out)):
        canvases = split.take(np.arange(len(split)))
        assert np.array_equal(canvases, np.stack([encode_stories(tokenizer, [text])[0] for text in texts]))
    assert tokenizer.decode(data.valid.take(np.array([0]))[0].tolist()) == STORIES[0]
    assert data.meta.vocab_size == tokenizer.get_vocab_size() == 300
    assert data.meta.train.text_bytes == sum(len(text.encode()) for text in train)
    assert not set(SPECIAL_TOKENS) & set(tokenizer.encode(STORIES[0]).tokens)


def test_validation_files_of_a_folder_are_used_whole_and_nothing_else_is_held_out(tmp_path: Path) -> None:
    folder = tmp_path / "TinyStories"
    folder.mkdir()
    (folder / "a.txt").write_text("\n\n".join(STORIES[:150]))
    (folder / "valid.txt").write_text("\n\n".join(STORIES[150:153]))
    meta = prepare(str(folder), tmp_path / "out", vocab_size=280)
    assert (meta.train.stories, meta.valid.stories) == (150, 3)
    assert (meta.source, meta.licence) == ("TinyStories", "CDLA-Sharing-1.0")


def test_a_rerun_with_nothing_changed_touches_nothing_and_says_so(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(str(source), tmp_path / "out", vocab_size=280)
    before = snapshot(tmp_path / "out")
    capsys.readouterr()
    prepare(str(source), tmp_path / "out", vocab_size=280)
    assert snapshot(tmp_path / "out") == before
    assert capsys.readouterr().out == f"{tmp_path / 'out'} is up to date\n"


def test_a_changed_source_option_or_damaged_folder_is_prepared_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = prepare(str(source), out, vocab_size=280)
    assert prepare(str(source), out, vocab_size=281).vocab_size == 281
    os.utime(source, ns=(1, 1))
    assert prepare(str(source), out, vocab_size=280).fingerprint != first.fingerprint
    (out / "train-00000.bin").write_bytes(b"")
    prepare(str(source), out, vocab_size=280)
    load_data(out, verify=True)
    assert names(tmp_path) == {source.name, "out"}


def test_bad_input_leaves_the_earlier_folder_as_it_was(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(source), out, vocab_size=280)
    before = snapshot(out)
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(DataError, match="the gzip data is damaged or cut off"):
        prepare(str(source), out, vocab_size=280)
    assert snapshot(out) == before
    assert names(tmp_path) == {source.name, "out"}


def test_a_single_story_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("One story.")
    with pytest.raises(DataError, match=r"one\.txt has too few stories"):
        prepare(str(tmp_path / "one.txt"), tmp_path / "out")
    assert names(tmp_path) == {"one.txt"}


@pytest.mark.parametrize("size", [0, 259, 65_537])
def test_an_impossible_vocabulary_is_refused(size: int, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--vocab-size must be 260 to 65536, not {size}"):
        prepare(str(source), tmp_path / "out", vocab_size=size)


@pytest.mark.parametrize("make", [lambda p: p.write_text("mine"), lambda p: (p.mkdir(), (p / "mine").touch())])
def test_what_host_data_did_not_make_is_never_replaced(make: object, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)  # type: ignore[operator]
    with pytest.raises(DataError, match="exists and is not a data folder: choose another --out"):
        prepare(str(source), out, vocab_size=280)
    assert out.exists()


def test_a_place_that_cannot_be_written_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffusionLLMError, match="out cannot be written: Not a directory"):
        prepare(str(source), source / "out", vocab_size=280)


def test_a_linked_folder_is_replaced_where_it_really_is(source: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(elsewhere / "real")
    prepare(str(source), tmp_path / "out", vocab_size=280)
    assert (tmp_path / "out").is_symlink()
    assert (elsewhere / "real" / DATA_FILE).exists()
    assert names(elsewhere) == {"real"}


def test_two_runs_cannot_prepare_the_same_folder(source: Path, tmp_path: Path) -> None:
    with swapped_in(tmp_path / "out"):
        with pytest.raises(DataError, match="another process is writing"):
            prepare(str(source), tmp_path / "out", vocab_size=280)
        (tmp_path / ".out.partial" / DATA_FILE).touch()
    assert names(tmp_path / "out") == {DATA_FILE}


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A source that takes so long that a run on it can be stopped in the middle."""
    path = tmp_path / "long.parquet"
    pq.write_table(pa.table({"text": ["Once upon a time, Tom had a red ball."] * 60_000}), path)
    return path


def is_encoding(out: Path) -> bool:
    return (out.with_name(f".{out.name}.partial") / "train-00000.bin").exists()


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_run_stopped_in_the_middle_leaves_nothing_half_written(
    how: signal.Signals, status: int, endless: Path, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = start("--source", endless, "--vocab-size", 270, "--out", out)
    deadline = time.monotonic() + 60
    while not is_encoding(out) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    run.send_signal(how)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == status
    assert "Traceback" not in errors
    assert not out.exists()
    if how is not signal.SIGKILL:
        assert names(tmp_path) == {source.name, endless.name}
        return
    prepare(str(source), out, vocab_size=280)  # the next run clears what a killed one could not
    assert load_data(out, verify=True).meta.train.stories == 247
    assert names(tmp_path) == {source.name, endless.name, "out"}


def test_the_command_prints_one_sentence_for_an_error(tmp_path: Path) -> None:
    run = start("--source", "missing.txt", "--out", tmp_path / "out")
    output, errors = run.communicate(timeout=60)
    assert (run.returncode, output) == (65, "")
    assert errors == "error: --source missing.txt does not exist: give a file, a folder, or a hub data set OWNER/NAME\n"
