"""Prepared data on disk: canvases as raw little-endian uint16 shards, described by data.json.

DIR/data.json          counts, lengths, hashes, where the text came from
DIR/tokenizer.json     the tokenizer that made the canvases
DIR/train-00000.bin    (stories, 256) uint16, up to 65,536 stories a shard; likewise valid-*.bin and test-*.bin
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal, get_args

import msgspec
import numpy as np
from msgspec import Struct

from shared.errors import DataError
from shared.manifest import TOKENIZER, sha256_of
from shared.tokens import CANVAS_LEN, EOS, PAD

FORMAT_VERSION: Final = 2
DATA_FILE: Final = "data.json"
SHARD_STORIES: Final = 1 << 16
ID_DTYPE: Final = np.dtype("<u2")
QUANTILES: Final = {"p01": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}

SplitName = Literal["train", "valid", "test"]
"""valid: for choices such as checkpoints, rates and sampling settings. test: for reported figures only."""
SPLITS: Final[tuple[SplitName, ...]] = get_args(SplitName)


class ShardMeta(Struct, frozen=True, forbid_unknown_fields=True):
    """One shard file and how many canvases it holds."""

    file: str
    stories: int
    sha256: str


class SplitMeta(Struct, frozen=True, forbid_unknown_fields=True):
    """A split's counts. tokens: text tokens and EOS, as the loss counts them. text_bytes: without what was truncated.

    lengths: lengths[i] stories take i positions, BOS and EOS included. quantiles: of these lengths.
    """

    stories: int
    tokens: int
    text_bytes: int
    truncated: int
    quantiles: dict[str, int]
    lengths: tuple[int, ...]
    shards: tuple[ShardMeta, ...]


class DataMeta(Struct, frozen=True, forbid_unknown_fields=True):
    """data.json. fingerprint: hash of the input files and options, by which a rerun sees that nothing changed."""

    format_version: int
    source: str
    licence: str
    vocab_size: int
    canvas_len: int
    tokenizer_sha256: str
    fingerprint: str
    train: SplitMeta
    valid: SplitMeta
    test: SplitMeta

    @property
    def sha256(self) -> str:
        """Hash of the tokenizer and all canvases: equal for the same text and options on any machine."""
        shards = [shard.sha256 for split in (self.train, self.valid, self.test) for shard in split.shards]
        return hashlib.sha256("".join([self.tokenizer_sha256, *shards]).encode()).hexdigest()


class _Format(Struct, frozen=True):
    """Decoded first, to recognize another version's data.json."""

    format_version: int
    canvas_len: int


@dataclass(frozen=True)
class Split:
    """Memory-mapped canvases of one split; each shard (n, canvas_len) uint16."""

    shards: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def first(self, count: int) -> np.ndarray:
        """Copies of the first canvases, of all where there are fewer.  → (at most count, canvas_len) uint16"""
        return self.take(np.arange(min(len(self), count)))

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Copies of the canvases at `indices` (m,), in that order.  → (m, canvas_len) uint16"""
        ends = np.cumsum([len(shard) for shard in self.shards])
        if len(indices) and (indices.min() < 0 or indices.max() >= ends[-1]):
            raise IndexError(f"story index out of range for {ends[-1]} stories")
        taken = np.empty((len(indices), self.shards[0].shape[1]), dtype=np.uint16)
        which = np.searchsorted(ends, indices, side="right")
        for i in np.unique(which):
            shard = self.shards[i]
            here = which == i
            taken[here] = shard[indices[here] - (ends[i] - len(shard))]
        return taken


@dataclass(frozen=True)
class DataFolder:
    """A prepared data folder, open for reading."""

    path: Path
    meta: DataMeta
    train: Split
    valid: Split
    test: Split

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer that made the canvases."""
        return self.path / TOKENIZER


class SplitWriter:
    """Writes one split's shards and counts them, in the memory of one block."""

    def __init__(self, folder: Path, name: SplitName, token_bytes: np.ndarray) -> None:
        """token_bytes: how many bytes each id spells, (vocabulary,) int64."""
        self._folder = folder
        self._name = name
        self._token_bytes = token_bytes
        self._shards: list[ShardMeta] = []
        self._file: BinaryIO | None = None
        self._in_shard = 0
        self._hash = hashlib.sha256()
        self._lengths = np.zeros(CANVAS_LEN + 1, dtype=np.int64)
        self._text_bytes = 0
        self._truncated = 0

    def add(self, canvases: np.ndarray) -> None:
        """Append canvases (n, CANVAS_LEN) uint16."""
        lengths = (canvases != PAD).sum(axis=1)
        self._lengths += np.bincount(lengths, minlength=CANVAS_LEN + 1)
        self._text_bytes += int(self._token_bytes[canvases].sum())
        self._truncated += int(((lengths == CANVAS_LEN) & (canvases[:, -1] != EOS)).sum())
        while len(canvases):
            part = canvases[: SHARD_STORIES - self._in_shard]
            canvases = canvases[len(part) :]
            self._write(part.astype(ID_DTYPE, copy=False).tobytes(), len(part))

    def _write(self, block: bytes, stories: int) -> None:
        if self._file is None:
            self._file = (self._folder / self._shard_file()).open("wb")
            self._hash = hashlib.sha256()
        self._file.write(block)
        self._hash.update(block)
        self._in_shard += stories
        if self._in_shard == SHARD_STORIES:
            self._end_shard()

    def _shard_file(self) -> str:
        return f"{self._name}-{len(self._shards):05d}.bin"

    def _end_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        self._shards.append(ShardMeta(self._shard_file(), self._in_shard, self._hash.hexdigest()))
        self._in_shard = 0

    def finish(self) -> SplitMeta:
        """Close the last shard.  → the split's counts"""
        self._end_shard()
        stories = int(self._lengths.sum())
        positions = int((self._lengths * np.arange(CANVAS_LEN + 1)).sum())
        so_far = np.cumsum(self._lengths)
        return SplitMeta(
            stories=stories,
            tokens=positions - stories,  # every canvas has one BOS, which is never predicted
            text_bytes=self._text_bytes,
            truncated=self._truncated,
            quantiles={name: int(np.searchsorted(so_far, q * stories)) for name, q in QUANTILES.items()},
            lengths=tuple(self._lengths.tolist()),
            shards=tuple(self._shards),
        )


def read_meta(path: Path) -> DataMeta:
    """Read data.json of a folder. Raises DataError when it is missing, damaged, or of another version."""
    file = path / DATA_FILE
    try:
        raw = file.read_bytes()
    except OSError:
        raise DataError(f"{path} holds no prepared data: make it with python -m host.data --out {path}") from None
    try:
        if msgspec.json.decode(raw, type=_Format) != _Format(FORMAT_VERSION, CANVAS_LEN):
            raise DataError(f"{file} was written by another version of host.data: {_again(path)}")
        return msgspec.json.decode(raw, type=DataMeta)
    except msgspec.DecodeError as error:
        raise DataError(f"{file} is damaged ({error}): {_again(path)}") from None


def load_data(path: Path, verify: bool = False) -> DataFolder:
    """Open a prepared data folder; sizes are always checked, hashes with `verify`.

    Raises DataError, which names the file, when something is missing, cut off or altered.
    """
    meta = read_meta(path)
    tokenizer = path / TOKENIZER
    if not tokenizer.is_file() or sha256_of(tokenizer) != meta.tokenizer_sha256:
        raise DataError(f"{tokenizer} is missing or altered: {_again(path)}")
    train, valid, test = (_open_split(path, split, verify) for split in (meta.train, meta.valid, meta.test))
    return DataFolder(path, meta, train, valid, test)


def _open_split(path: Path, meta: SplitMeta, verify: bool) -> Split:
    shards = []
    for shard in meta.shards:
        file = path / shard.file
        expected = shard.stories * CANVAS_LEN * ID_DTYPE.itemsize
        size = file.stat().st_size if file.is_file() else 0
        if size != expected:
            raise DataError(f"{file} has {size} bytes instead of {expected}: {_again(path)}")
        if verify and sha256_of(file) != shard.sha256:
            raise DataError(f"{file} was altered since it was written: {_again(path)}")
        shards.append(np.memmap(file, dtype=ID_DTYPE, mode="r", shape=(shard.stories, CANVAS_LEN)))
    return Split(tuple(shards))


def _again(path: Path) -> str:
    return f"prepare it again with python -m host.data --out {path}"
