"""`python -m host.data`: stories in, a data folder out, whole or not at all."""

import gzip
import hashlib
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

from host.data.prepare import default_out, main, prepare
from host.data.shards import DATA_FILE, load_data
from host.data.tokenizer import encode_stories, load_tokenizer
from host.files import swapped_in
from shared.errors import ConfigError, DataError, DiffusionLLMError
from shared.manifest import TOKENIZER
from shared.tokens import SPECIAL_TOKENS
from tests.support.commands import call

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


def split_of(text: str) -> str:
    """By the published rule: the first eight bytes of BLAKE2b of the text, modulo 50."""
    bucket = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 50
    return {0: "valid", 1: "test"}.get(bucket, "train")


def test_prepare_splits_by_hash_and_every_story_becomes_its_canvas(source: Path, tmp_path: Path) -> None:
    prepare([str(source)], tmp_path / "out", vocab_size=300)
    data = load_data(tmp_path / "out", verify=True)
    tokenizer = load_tokenizer(data.tokenizer_path)
    for name, split in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        texts = [text for text in STORIES if split_of(text) == name]
        canvases = split.take(np.arange(len(split)))
        assert len(texts) > 2
        assert np.array_equal(canvases, np.stack([encode_stories(tokenizer, [text])[0] for text in texts]))
    assert data.meta.vocab_size == tokenizer.get_vocab_size() == 300
    train = [text for text in STORIES if split_of(text) == "train"]
    assert data.meta.train.text_bytes == sum(len(text.encode()) for text in train)
    assert not set(SPECIAL_TOKENS) & set(tokenizer.encode(STORIES[0]).tokens)


def test_prepare_keeps_a_story_told_twice_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "twice.txt").write_text("\n\n".join([*STORIES, *STORIES]))
    prepare([str(tmp_path / "twice.txt")], tmp_path / "out", vocab_size=280)
    data = load_data(tmp_path / "out")
    rows = {
        name: {row.tobytes() for row in getattr(data, name).take(np.arange(len(getattr(data, name))))}
        for name in ("train", "valid", "test")
    }
    assert all(rows.values())
    assert not rows["train"] & (rows["valid"] | rows["test"])


def test_prepare_uses_validation_and_test_files_whole(tmp_path: Path) -> None:
    folder = tmp_path / "TinyStories"
    folder.mkdir()
    (folder / "a.txt").write_text("\n\n".join(STORIES[:150]))
    (folder / "valid.txt").write_text("\n\n".join(STORIES[150:152]))
    (folder / "valid2.txt").write_text(STORIES[152])
    (folder / "test.txt").write_text("\n\n".join(STORIES[153:157]))
    meta = prepare([str(folder)], tmp_path / "out", vocab_size=280)
    assert (meta.train.stories, meta.valid.stories, meta.test.stories) == (150, 3, 4)
    assert (meta.source, meta.licence) == ("TinyStories", "CDLA-Sharing-1.0")


def test_prepare_holds_out_a_test_split_where_only_validation_is_given(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\n\n".join(STORIES))
    (tmp_path / "valid.txt").write_text("Only this.")
    sources = [str(tmp_path / "train.txt"), str(tmp_path / "valid.txt")]
    meta = prepare(sources, tmp_path / "out", vocab_size=280)
    test = sum(split_of(text) == "test" for text in STORIES)
    assert (meta.train.stories, meta.valid.stories, meta.test.stories) == (250 - test, 1, test)


@pytest.mark.parametrize("flags", [["--source", "{a}", "--source", "{b}"], ["--source", "{a}", "{b}"]])
def test_data_command_takes_several_sources(flags: list[str], tmp_path: Path) -> None:
    """The second used to replace the first without a word."""
    for name, stories in (("a", STORIES[:100]), ("b", STORIES[100:])):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(stories))
    given = [flag.format(a=tmp_path / "a.txt", b=tmp_path / "b.txt") for flag in flags]
    call(main, *given, "--out", tmp_path / "out", "--vocab-size", 280)
    meta = load_data(tmp_path / "out").meta
    assert meta.train.stories + meta.valid.stories + meta.test.stories == 250


@pytest.mark.parametrize(
    ("sources", "folder"),
    [
        (["roneneldan/TinyStories"], "tinystories"),
        (["{0}/My Logs.jsonl.gz"], "my-logs"),
        (["{0}/My Logs.jsonl.gz", "{0}/b.txt"], "{1}"),
        (["{0}"], "{1}"),
    ],
)
def test_default_folder_is_named_after_the_source(sources: list[str], folder: str, tmp_path: Path) -> None:
    (tmp_path / "My Logs.jsonl.gz").touch()
    (tmp_path / "b.txt").touch()
    filled = [source.format(tmp_path) for source in sources]
    assert default_out(filled) == Path("data") / folder.format("", tmp_path.name.lower())


def test_prepare_again_touches_nothing_and_says_so(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare([str(source)], tmp_path / "out", vocab_size=280)
    before = snapshot(tmp_path / "out")
    capsys.readouterr()
    prepare([str(source)], tmp_path / "out", vocab_size=280)
    assert snapshot(tmp_path / "out") == before
    assert capsys.readouterr().out == f"{tmp_path / 'out'} is up to date\n"


def test_prepare_never_replaces_data_of_other_text_or_settings(source: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other.txt"
    other.write_text("\n\n".join(f"Anna saw {i} birds." for i in range(250)))
    prepare([str(source)], out, vocab_size=280)
    before = snapshot(out)
    for sources, vocab_size in (([str(other)], 280), ([str(source)], 281)):
        with pytest.raises(DataError, match=r"holds data prepared from stories\.jsonl\.gz with other text or settings"):
            prepare(sources, out, vocab_size=vocab_size)
    os.utime(source, ns=(1, 1))
    with pytest.raises(DataError, match="choose another --out, or remove it first"):
        prepare([str(source)], out, vocab_size=280)
    assert snapshot(out) == before


def test_prepare_replaces_a_damaged_folder_or_one_of_another_version(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare([str(source)], out, vocab_size=280)
    (out / "train-00000.bin").write_bytes(b"")
    prepare([str(source)], out, vocab_size=280)
    load_data(out, verify=True)
    meta = json.loads((out / DATA_FILE).read_text())
    del meta["test"]
    (out / DATA_FILE).write_text(json.dumps(meta | {"format_version": 1}))
    with pytest.raises(DataError, match="was written by another version of"):
        load_data(out)
    prepare([str(source)], out, vocab_size=280)
    load_data(out, verify=True)
    assert names(tmp_path) == {source.name, "out"}


def test_prepare_of_bad_input_leaves_the_folder_as_it_was(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare([str(source)], out, vocab_size=280)
    (out / "train-00000.bin").write_bytes(b"")
    before = snapshot(out)
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(DataError, match="the gzip data is damaged or cut off"):
        prepare([str(source)], out, vocab_size=280)
    assert snapshot(out) == before
    assert names(tmp_path) == {source.name, "out"}


def test_prepare_refuses_too_few_stories_to_split(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("\n\n".join(text for text in STORIES if split_of(text) != "test"))
    with pytest.raises(DataError, match=r"few\.txt has too few stories: none fell to test, which takes one text in 50"):
        prepare([str(tmp_path / "few.txt")], tmp_path / "out", vocab_size=280)
    assert names(tmp_path) == {"few.txt"}


@pytest.mark.parametrize("size", [0, 259, 65_537])
def test_prepare_refuses_an_impossible_vocabulary(size: int, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--vocab-size must be 260 to 65536, not {size}"):
        prepare([str(source)], tmp_path / "out", vocab_size=size)


def test_prepare_reuses_the_tokenizer_of_another_folder(source: Path, tmp_path: Path) -> None:
    prepare([str(source)], tmp_path / "first", vocab_size=280)
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"Sam saw {i} birds." for i in range(400)))
    made = [
        prepare([str(other)], tmp_path / name, tokenizer_of=folder)
        for name, folder in (("second", tmp_path / "first"), ("third", tmp_path / "second"))
    ]
    assert (tmp_path / "second" / TOKENIZER).read_bytes() == (tmp_path / "first" / TOKENIZER).read_bytes()
    assert made[0] == made[1] and made[0].vocab_size == 280
    tokenizer, data = load_tokenizer(tmp_path / "first" / TOKENIZER), load_data(tmp_path / "second", verify=True)
    ids = data.train.take(np.arange(1))[0]
    assert tokenizer.decode(ids[ids >= len(SPECIAL_TOKENS)].tolist()).startswith("Sam saw")


def test_prepare_with_another_tokenizer_does_not_replace_data(source: Path, tmp_path: Path) -> None:
    for name, size in (("a", 270), ("b", 280)):
        prepare([str(source)], tmp_path / name, vocab_size=size)
    prepare([str(source)], tmp_path / "out", tokenizer_of=tmp_path / "a")
    with pytest.raises(DataError, match="other text or settings"):
        prepare([str(source)], tmp_path / "out", tokenizer_of=tmp_path / "b")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "other has no tokenizer.json: give the folder of a run or of prepared data"), ("{}", "cannot be read")],
)
def test_prepare_refuses_a_folder_without_a_tokenizer(
    content: str | None, words: str, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    if content is not None:
        (tmp_path / "other" / TOKENIZER).write_text(content)
    with pytest.raises(DataError, match=words):
        prepare([str(source)], tmp_path / "out", tokenizer_of=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_data_command_refuses_a_tokenizer_with_a_vocabulary_size(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        call(main, "--source", source, "--out", tmp_path / "out", "--tokenizer", tmp_path, "--vocab-size", 300)
    assert "argument --vocab-size: not allowed with argument --tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("make", [lambda p: p.write_text("mine"), lambda p: (p.mkdir(), (p / "mine").touch())])
def test_prepare_never_replaces_what_it_did_not_make(make: object, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)  # type: ignore[operator]
    with pytest.raises(DataError, match="exists and is not a data folder: choose another --out"):
        prepare([str(source)], out, vocab_size=280)
    assert out.exists()


def test_prepare_names_a_place_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffusionLLMError, match="out cannot be written: Not a directory"):
        prepare([str(source)], source / "out", vocab_size=280)


def test_prepare_through_a_link_writes_where_it_leads(source: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to(elsewhere / "real")
    prepare([str(source)], tmp_path / "out", vocab_size=280)
    assert (tmp_path / "out").is_symlink()
    assert (elsewhere / "real" / DATA_FILE).exists()
    assert names(elsewhere) == {"real"}


def test_prepare_twice_at_once_is_refused(source: Path, tmp_path: Path) -> None:
    with swapped_in(tmp_path / "out"):
        with pytest.raises(DataError, match="another process is writing"):
            prepare([str(source)], tmp_path / "out", vocab_size=280)
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
def test_prepare_stopped_in_the_middle_leaves_nothing(
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
    prepare([str(source)], out, vocab_size=280)  # the next run clears what a killed one could not
    assert load_data(out, verify=True).meta.train.stories > 200
    assert names(tmp_path) == {source.name, endless.name, "out"}


def test_data_command_prints_one_sentence_for_an_error(tmp_path: Path) -> None:
    run = start("--source", "missing.txt", "--out", tmp_path / "out")
    output, errors = run.communicate(timeout=60)
    assert (run.returncode, output) == (65, "")
    assert errors == "error: --source missing.txt does not exist: give a file, a folder, or a Hub data set OWNER/NAME\n"
