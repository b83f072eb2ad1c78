"""Reading stories: every format yields the same texts; every kind of bad input is one sentence naming the place."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from host.data.sources import MAX_LINE_BYTES, MAX_STORY_CHARS, open_corpus, read_texts
from shared.errors import DataError

STORIES = ["Tom had a ball.\nIt was red.", "2020-01-01", "A naïve ☃ said <MASK>."]


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def write_parquet(path: Path, **columns: list[object]) -> None:
    pq.write_table(pa.table(columns), path)


FORMATS: dict[str, Callable[[Path], object]] = {
    "blank lines.txt": lambda p: p.write_text("\n\n" + "\n\n".join(STORIES) + "\n\n\n"),
    "separators.txt": lambda p: p.write_text("\n<|endoftext|>\n".join(STORIES)),
    "windows.txt": lambda p: p.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(STORIES).replace("\n", "\r\n").encode()),
    "lines.jsonl": lambda p: p.write_bytes(json_lines(STORIES)),
    "blank lines, no last newline.jsonl": lambda p: p.write_bytes(json_lines(STORIES).replace(b"\n", b"\n\n").rstrip()),
    "lines.jsonl.gz": lambda p: p.write_bytes(gzip.compress(json_lines(STORIES))),
    "UPPER [1] *.JSONL": lambda p: p.write_bytes(json_lines(["", " \n ", *STORIES])),
    "table.parquet": lambda p: write_parquet(p, id=[1, 2, 3], text=list(STORIES)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_texts_of_every_format_are_the_same(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)
    assert list(read_texts(tmp_path / name)) == STORIES
    assert list(read_texts(tmp_path)) == STORIES


def test_texts_with_separators_keep_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n\nStill one.\n<|endoftext|>\nTwo.\n<|endoftext|>\n")
    assert list(read_texts(tmp_path / "a.txt")) == ["One.\n\nStill one.", "Two."]


def test_texts_without_separators_are_one_of_bounded_size(tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text("A line of a novel.\n" * 20_000)
    (story,) = read_texts(tmp_path / "novel.txt")
    assert len(story) == MAX_STORY_CHARS


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a.txt": (lambda p: p.write_bytes(b""), "a.txt is empty"),
    "b.txt": (lambda p: p.write_bytes(b"\n \n\n"), "b.txt: no stories, only blanks"),
    "c.txt": (lambda p: p.write_bytes(b"one\n\x7fELF\0\0\n"), "c.txt, line 2 holds a zero byte: this is binary"),
    "d.txt": (lambda p: p.write_bytes("one\ntwo\ncafé".encode("latin-1")), "d.txt, line 3, byte 4 is not UTF-8 text"),
    "e.txt": (lambda p: p.write_bytes(b"a\n" + b"x" * (MAX_LINE_BYTES + 1)), "e.txt, line 2 is longer than 4 MiB"),
    "f.jsonl": (lambda p: p.write_text('{"text": "a"}\n{"story": "b"}\n'), "f.jsonl, line 2 .* missing .* `text`"),
    "g.jsonl": (lambda p: p.write_text('\n{"text": 5}\n'), "g.jsonl, line 2 .* Expected `str`, got `int`"),
    "h.jsonl": (lambda p: p.write_text('["a"]\n'), "h.jsonl, line 1 .* Expected `object`, got `array`"),
    "i.jsonl": (lambda p: p.write_text('{"text": "a"}\n{"text": '), "i.jsonl, line 2 is not valid JSON"),
    "j.jsonl": (lambda p: p.write_text('{"text": "\\ud800"}\n'), "j.jsonl, line 1 is not valid JSON"),
    "k.jsonl.gz": (
        lambda p: p.write_bytes(gzip.compress(json_lines([os.urandom(99).hex() for _ in range(99)]))[:-4000]),
        r"k.jsonl.gz, after line \d+: the gzip data is damaged or cut off",
    ),
    "l.jsonl.gz": (lambda p: p.write_text('{"text": "a"}\n'), "l.jsonl.gz, after line 0: .*Not a gzipped file"),
    "m.parquet": (lambda p: p.write_text("no parquet"), "m.parquet cannot be read as parquet"),
    "n.parquet": (lambda p: write_parquet(p, story=["a"]), "n.parquet has no column named text, only story"),
    "o.parquet": (lambda p: write_parquet(p, text=[1]), "o.parquet: the column text holds int64, not strings"),
    "p.parquet": (lambda p: write_parquet(p, text=["a", None]), "p.parquet, record 2: text is null"),
    "q.csv": (lambda p: p.write_text("text\n"), r"q.csv has an unknown ending: .* \.txt, \.jsonl"),
    "r": (lambda p: p.mkdir(), "the folder .*r has no files ending in .txt"),
    "s.txt": (lambda p: None, "s.txt does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_texts_refuse_bad_input_by_file_and_line(name: str, tmp_path: Path) -> None:
    make, sentence = BAD[name]
    make(tmp_path / name)
    with pytest.raises(DataError, match=sentence) as caught:
        list(read_texts(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *((name, "valid") for name in ("valid.jsonl", "valid2.jsonl", "validation-00000.txt", "TinyStories-val.txt")),
        *((name, "test") for name in ("test.jsonl", "test-00000.txt", "TinyStories-test.txt")),
    ],
)
def test_corpus_knows_files_of_a_split_by_name(name: str, split: str, tmp_path: Path) -> None:
    for other in ("valley.txt", "latest.txt"):
        (tmp_path / other).write_text("To train on.")
    (tmp_path / name).write_text('{"text": "Held out."}')
    (tmp_path / "README.md").write_text("Not a story.")
    corpus = open_corpus([str(tmp_path)])
    assert list(corpus.train()) == ["To train on."] * 2
    held_out = {"valid": corpus.valid, "test": corpus.test}
    texts = held_out.pop(split)
    assert texts is not None and "Held out." in next(texts())
    assert list(held_out.values()) == [None]


def test_corpus_of_one_file_is_trained_on_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("To train on.")
    assert list(open_corpus([str(tmp_path / "test.txt")]).train()) == ["To train on."]


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [(["{0}/a.txt", "{0}"], r"--source names .*a\.txt twice"), (["{0}", "owner/stories"], "is prepared alone")],
)
def test_corpus_refuses_sources_that_cannot_go_together(sources: list[str], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.")
    with pytest.raises(DataError, match=sentence):
        open_corpus([source.format(tmp_path) for source in sources])


def test_corpus_of_validation_files_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("To validate on.")
    with pytest.raises(DataError, match="validation and test files only: add files to train on"):
        open_corpus([str(tmp_path)])


def test_corpus_neither_a_path_nor_a_hub_name_is_refused(tmp_path: Path) -> None:
    for source in ("nowhere", "no/where.txt", str(tmp_path / "nowhere")):
        with pytest.raises(DataError, match="does not exist: give a file, a folder, or a Hub data set OWNER/NAME"):
            open_corpus([source])


def test_texts_of_local_files_leave_nothing_behind(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "a.txt").write_text("One.\n\nTwo.")
    script = "import sys, pathlib, host.data.sources as t; print(list(t.read_texts(pathlib.Path(sys.argv[1]))))"
    # No hub may be asked either: nothing listens at the endpoint.
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TMPDIR": str(home),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.txt")],
        cwd=Path(__file__).parents[4],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "['One.', 'Two.']\n"
    assert list(home.rglob("*")) == []
