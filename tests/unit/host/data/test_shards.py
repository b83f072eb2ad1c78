"""Shards: what is written is what is read, in every order; whatever was altered is refused by name."""

from pathlib import Path

import numpy as np
import pytest

from host.data import shards
from host.data.prepare import prepare
from host.data.shards import DATA_FILE, DataFolder, Split, SplitWriter, load_data
from shared.errors import DataError
from shared.tokens import BOS, EOS, PAD

STORIES = [f"Story {i} is about {'a very ' * (i % 7)}big cat." for i in range(250)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    (path / "stories.txt").write_text("\n\n".join(STORIES))
    prepare([str(path / "stories.txt")], path / "out", vocab_size=300)
    return path / "out"


@pytest.fixture
def data(folder: Path) -> DataFolder:
    return load_data(folder, verify=True)


def canvas(text_ids: list[int], ends: bool = True) -> np.ndarray:
    ids = [BOS, *text_ids, *([EOS] if ends else [])]
    return np.array(ids + [PAD] * (256 - len(ids)), dtype=np.uint16)


def test_split_take_copies_in_order_across_shards() -> None:
    rows = np.arange(10 * 256, dtype=np.uint16).reshape(10, 256)
    split = Split((rows[:4], rows[4:5], rows[5:]))
    wanted = np.array([9, 0, 4, 5, 3, 3])
    assert len(split) == 10
    taken = split.take(wanted)
    assert np.array_equal(taken, rows[wanted])
    assert not np.shares_memory(taken, rows)
    assert split.take(np.array([], dtype=np.int64)).shape == (0, 256)


@pytest.mark.parametrize("index", [-1, 10])
def test_split_take_refuses_an_index_outside(index: int) -> None:
    with pytest.raises(IndexError, match="out of range for 10 stories"):
        Split((np.zeros((10, 256), dtype=np.uint16),)).take(np.array([index]))


def test_split_counts_are_those_of_the_text_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_STORIES", 2)
    token_bytes = np.array([0, 0, 0, 0, 1, 7])
    writer = SplitWriter(tmp_path, "train", token_bytes)
    rows = np.stack([canvas([4, 5]), canvas([5] * 254), canvas([4] * 255, ends=False), canvas([]), canvas([4])])
    writer.add(rows[:3])
    writer.add(rows[3:])
    meta = writer.finish()
    assert (meta.stories, meta.truncated) == (5, 1)
    assert meta.tokens == (2 + 1) + (254 + 1) + 255 + 1 + (1 + 1)
    assert meta.text_bytes == 8 + 254 * 7 + 255 + 0 + 1
    assert {i: n for i, n in enumerate(meta.lengths) if n} == {2: 1, 3: 1, 4: 1, 256: 2}
    assert (meta.quantiles["p10"], meta.quantiles["p50"], meta.quantiles["p99"]) == (2, 4, 256)
    assert [(s.file, s.stories) for s in meta.shards] == [
        ("train-00000.bin", 2),
        ("train-00001.bin", 2),
        ("train-00002.bin", 1),
    ]
    raw = b"".join((tmp_path / s.file).read_bytes() for s in meta.shards)
    assert raw == rows.astype("<u2").tobytes()


def test_split_is_memory_mapped_and_cannot_be_written(data: DataFolder) -> None:
    (shard,) = data.train.shards
    assert isinstance(shard, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        shard[0, 0] = 0


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the prepared folder, to be damaged."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_load_data_of_a_missing_folder_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nothing holds no prepared data: make it with python -m host.data --out .*nothing"
    ):
        load_data(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["train-00000.bin", "valid-00000.bin", "tokenizer.json"])
def test_load_data_names_a_missing_file(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(DataError, match=f"{name} .*prepare it again with python -m host.data"):
        load_data(copy)


def test_load_data_names_a_truncated_shard(copy: Path) -> None:
    shard = copy / "train-00000.bin"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"train-00000\.bin has {size - 2} bytes instead of {size}"):
        load_data(copy)


def test_load_data_finds_an_altered_shard_by_its_hash(copy: Path) -> None:
    shard = copy / "valid-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    load_data(copy)
    with pytest.raises(DataError, match=r"valid-00000\.bin was altered"):
        load_data(copy, verify=True)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("{", "", "data.json is damaged"),
        ('"stories"', '"tales"', "data.json is damaged"),
        ('"format_version": 2', '"format_version": 1', "written by another version of host.data"),
    ],
)
def test_load_data_refuses_a_damaged_or_foreign_description(old: str, new: str, sentence: str, copy: Path) -> None:
    file = copy / DATA_FILE
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=sentence):
        load_data(copy)
