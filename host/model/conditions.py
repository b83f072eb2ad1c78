"""Conditions: words and pictures, encoded into a memory that every block reads by cross-attention.

Rows that see nothing of it are scored as before, to the bit: what a block reads is added to its attention's result, and
starts at zero. Queries are made of the same normed rows as those of self-attention, so that both are one product.
B: texts, R: word tokens, n: pictures, M: memory rows, D: width, H: heads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from host.model.block import Block, attend
from shared.tokens import PAD

WORDS: Final = 3  # of a text at most
WORD_TOKENS: Final = 8  # of a word at most
PICTURES: Final = 3  # of a text at most
PICTURE_SIZE: Final = 64  # pixels on each side
PICTURE_GRID: Final = 16  # rows that a picture's encoder makes, 4 × 4
MERGED: Final = 4  # of them make one row of the memory
PICTURE_ROWS: Final = PICTURE_GRID // MERGED  # of the memory, a picture
DEPTH: Final = 2  # blocks of an encoder
STEM: Final = (32, 128)  # channels between the pixels and the width of the network


@dataclass(frozen=True)
class Condition:
    """What one text is to tell of: at least a word or a picture."""

    words: Sequence[Sequence[int]] = ()  # tokens of each
    pictures: Tensor = field(default_factory=lambda: torch.zeros(0, 3, PICTURE_SIZE, PICTURE_SIZE))
    """(n, 3, 64, 64) float32, RGB in 0 … 1."""
    go_on: frozenset[int] = frozenset()  # tokens that go on with the word before them


@dataclass
class Remaining:
    """What a text is still asked for. left: numbers of the words that it has not told.

    A word is told where its tokens stand in the written text, one after another, and what follows does not go on with
    it. Rows from the one behind it on do not read it; where nothing is left to read, they read no memory, and are not
    guided. Read to the end, a word comes back over and over.
    """

    condition: Condition
    left: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.left = set(range(len(self.condition.words)))

    def tells(self, text: Sequence[int]) -> bool:
        """Whether the last token of a text, written so far, stands behind a word that was left, which so is told."""
        before = list(text[:-1])
        words = {} if text[-1] in self.condition.go_on else {i: list(self.condition.words[i]) for i in self.left}
        told = {i for i, word in words.items() if before[-len(word) :] == word}
        self.left -= told
        return bool(told)

    @property
    def nothing(self) -> bool:
        """Whether all is told, and there are no pictures."""
        return not self.left and not len(self.condition.pictures)

    def hidden(self, rows: int) -> Tensor:
        """Which of a memory's rows are read no more: of told words, at last the one before them, too.  → (rows,)"""
        hidden = torch.zeros(rows, dtype=torch.bool)
        if self.condition.words:
            words = [i not in self.left for i, word in enumerate(self.condition.words) for _ in word]
            hidden[: 1 + len(words)] = torch.tensor([not self.left, *words])
        return hidden


class Given(NamedTuple):
    """The conditions of B texts.

    Their words: tokens, place of each token in its word, number of its word. Their pictures, of all texts one after
    another, RGB in 0 … 1, and where each belongs: text · PICTURES + number.
    """

    tokens: Tensor  # (B, R) int64, PAD after the last
    places: Tensor  # (B, R) int64
    words: Tensor  # (B, R) int64
    pixels: Tensor  # (n, 3, 64, 64) float32
    pictures: Tensor  # (n,) int64

    @classmethod
    def of(cls, conditions: Sequence[Condition]) -> "Given":
        """B = len(conditions)"""
        tokens = [[t for word in one.words for t in word] for one in conditions]
        places = [[i for word in one.words for i in range(len(word))] for one in conditions]
        words = [[i for i, word in enumerate(one.words) for _ in word] for one in conditions]
        longest = max(map(len, tokens))
        rows = [torch.tensor([one + [PAD] * (longest - len(one)) for one in part]) for part in (tokens, places, words)]
        pixels = torch.cat([one.pictures for one in conditions])
        where = [b * PICTURES + i for b, one in enumerate(conditions) for i in range(len(one.pictures))]
        return cls(rows[0].long(), rows[1].long(), rows[2].long(), pixels, torch.tensor(where, dtype=torch.long))

    def to(self, device: torch.device) -> "Given":
        """The same on a device."""
        return Given(*(part.to(device) for part in self))


class Memory(NamedTuple):
    """Keys and values of each layer (B, H, M, D/H); bias (B, 1, 1, M) as in `encode`, None where it is zero."""

    keys: list[Tensor]
    values: list[Tensor]
    bias: Tensor | None

    def without(self, rows: Tensor) -> "Memory":
        """The same with some rows hidden.  rows (B, M) bool"""
        bias = torch.zeros_like(rows, dtype=self.keys[0].dtype)[:, None, None] if self.bias is None else self.bias
        return self._replace(bias=bias.masked_fill(rows[:, None, None], -torch.inf))

    def with_an_empty_row(self) -> "Memory":
        """One row more, which adds nothing to what reads it alone: a text that is asked for nothing more."""
        keys, values = ([F.pad(layer, (0, 0, 0, 1)) for layer in part] for part in (self.keys, self.values))
        return Memory(keys, values, None if self.bias is None else F.pad(self.bias, (0, 1)))


class WordEncoder(nn.Module):
    """Tokens of words through two bidirectional blocks; a learned row stands before them.

    Each token is its row of the body's embedding and its row of the LM head, so that a reader has the direction that
    scores it, also for rare words. Softmax over one row is 1: without the learned row, a word of one token would be
    read with the same weight at every place of the text.
    """

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.place_embedding = nn.Embedding(WORD_TOKENS, d_model)
        self.word_embedding = nn.Embedding(WORDS, d_model)
        self.token = nn.Linear(2 * d_model, d_model)
        self.nothing = nn.Parameter(0.02 * torch.randn(1, d_model))
        self.blocks = nn.ModuleList(Block(d_model, heads) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, rows: Tensor, places: Tensor, words: Tensor, bias: Tensor | None = None) -> Tensor:
        """rows (B, R, 2·D), places, words (B, R), bias (B, 1, 1, 1 + R) → (B, 1 + R, D)"""
        x = self.token(rows) + self.place_embedding(places) + self.word_embedding(words)
        x = torch.cat([self.nothing.expand(len(x), 1, -1).to(x.dtype), x], 1)
        for block in self.blocks:
            x, _ = block(x, bias)
        memory: Tensor = self.norm(x)
        return memory


class PictureEncoder(nn.Module):
    """Patches of 4 × 4 pixels, two convolutions that halve the grid, then 4 × 4 rows through two blocks."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, STEM[0], 4, stride=4)
        self.halves = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in (STEM, (STEM[1], d_model)))
        self.position_embedding = nn.Embedding(PICTURE_GRID, d_model)
        self.blocks = nn.ModuleList(Block(d_model, heads) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (n, 3, 64, 64) in 0 … 1 → (n, PICTURE_GRID, D)"""
        x = self.patches(2 * pixels - 1)
        for half in self.halves:
            x = half(F.gelu(x))
        x = x.flatten(2).transpose(1, 2) + self.position_embedding.weight
        for block in self.blocks:
            x, _ = block(x, None)
        memory: Tensor = self.norm(x)
        return memory


class Read(nn.Module):
    """A block's cross-attention: queries of the rows, keys and values of the memory.

    Values start as the memory itself, and `gain` scales them by channel: few parameters, shared by all words, that
    learn quickly to write what was asked for.
    """

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(d_model, d_model)
        self.kv = nn.Linear(d_model, 2 * d_model)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.gain = nn.Parameter(torch.zeros(d_model))

    def start_silent(self) -> None:
        """What is read starts at zero."""
        nn.init.eye_(self.kv.weight.data[self.kv.in_features :])
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.gain)

    def remembered(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, D) → keys and values (B, H, M, D/H)"""
        b, m, d = memory.shape
        keys, values = self.kv(memory).view(b, m, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(self, normed: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """normed (B, N, D) → (B, N, D)"""
        b, n, d = normed.shape
        q = self.q(normed).view(b, n, self.heads, d // self.heads).transpose(1, 2)
        mixed = attend(q, keys, values, bias).transpose(1, 2).reshape(b, n, d)
        change: Tensor = self.out(mixed) + self.gain * mixed
        return change


class Conditions(nn.Module):
    """Both encoders, and a reading for each block."""

    def __init__(self, d_model: int, heads: int, layers: int) -> None:
        super().__init__()
        self.words = WordEncoder(d_model, heads)
        self.pictures = PictureEncoder(d_model, heads)
        self.reads = nn.ModuleList(Read(d_model, heads) for _ in range(layers))

    def start_silent(self) -> None:
        """What blocks read starts at zero; a word's token starts as its row of the LM head."""
        nn.init.eye_(self.words.token.weight.data[:, self.words.token.out_features :])
        for read in self.reads:
            read.start_silent()  # type: ignore[operator]

    def encode(self, given: Given, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows (B, R, 2·D): of the words' tokens → memory (B, M, D), what is added to the scores of its rows (B, M)

        A text's words come first, then its pictures. Each MERGED rows of a picture side by side, trained to be copies
        (`host.train.picture_loss`), are one, their mean. log MERGED is added to its scores, so that softmax
        counts it as that many copies; −inf where a text has no such row.
        """
        has = given.tokens != PAD
        parts, bias = [], []
        if has.any():
            has = torch.cat([has.any(1, keepdim=True), has], 1)  # the row before the words goes with them
            seen = has | (torch.arange(has.shape[1], device=has.device) == 0)  # also where a text has no words at all
            parts.append(self.words(rows, given.places, given.words, _hidden(~seen)[:, None, None]))
            bias.append(_hidden(~has))
        if len(given.pixels):
            grids, b = self.pictures(given.pixels), len(given.tokens)
            shown = torch.from_numpy(merging()).to(grids) @ grids
            text, number = given.pictures // PICTURES, given.pictures % PICTURES
            most = int(number.max()) + 1
            slot = text * most + number
            apart = shown.new_zeros(b * most, *shown.shape[1:]).index_copy(0, slot, shown)
            parts.append(apart.view(b, -1, shown.shape[2]))
            mine = torch.zeros(b * most, dtype=torch.bool, device=shown.device).index_fill(0, slot, True)
            bias.append(_hidden(~mine.view(b, most)).repeat_interleave(PICTURE_ROWS, 1) + math.log(MERGED))
        return torch.cat(parts, 1), torch.cat(bias, 1)

    def remember(self, given: Given, rows: Tensor) -> Memory:
        """What every block reads of the conditions; each text has one at least."""
        memory, bias = self.encode(given, rows)
        pairs = [read.remembered(memory) for read in self.reads]  # type: ignore[operator]
        shown = bias[:, None, None] if bias.any() else None
        return Memory([keys for keys, _ in pairs], [values for _, values in pairs], shown)

    def reader(self, memory: Memory, layer: int) -> Callable[[Tensor], Tensor]:
        """What a layer's block reads, as `Block.forward` takes it."""
        read = self.reads[layer]
        return lambda normed: read(normed, memory.keys[layer], memory.values[layer], memory.bias)


def merging() -> NDArray[np.float32]:
    """Makes memory rows of a picture's grid: means of MERGED rows side by side.  → (PICTURE_ROWS, PICTURE_GRID)"""
    return np.repeat(np.eye(PICTURE_ROWS, dtype=np.float32) / np.float32(MERGED), MERGED, axis=1)


def _hidden(rows: Tensor) -> Tensor:
    """−inf at these rows (B, M), in the autocast dtype.  → (B, M)"""
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return torch.zeros_like(rows, dtype=dtype).masked_fill(rows, -torch.inf)
