"""Batches as a pure function of (seed, step): nothing to save, so that resuming repeats the run bit for bit."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from host.data.shards import Split
from host.model.conditions import Given
from host.model.layouts import Rows, stack
from host.train.objectives import OBJECTIVES, Example, Settings, shares_of_batch
from shared.tokens import FIRST_TEXT_ID, PAD

ROWS_BUCKET: Final = 64
SEQUENCES_BUCKET: Final = 8
SCORED_BUCKET: Final = 64
"""Where a compiler makes the kernels, numbers of rows, of sequences and of scored rows are multiples of these."""


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of similar length, padded to the longest, and their targets. M: scored rows of all sequences."""

    rows: Rows  # of B sequences
    lengths: Tensor  # (B,) rows before the padding
    t: Tensor  # (B,) float32
    at: Tensor  # (M,) int64, b·N + row
    target: Tensor  # (M,) int64
    weight: Tensor  # (M,) float32
    ends: Tensor  # (M,) int64, see `Denoiser.logits`
    given: Given | None = None  # the conditions of the B sequences, if they have any

    @classmethod
    def of(cls, examples: Sequence[Example], multiple: int = 1) -> "MicroBatch":
        """The number of rows is rounded up to a multiple."""
        rows = stack([one.rows for one in examples], multiple)
        n = rows.tokens.shape[1]
        conditions = [one.condition for one in examples if one.condition is not None]
        return cls(
            rows=rows,
            lengths=torch.tensor([one.rows.tokens.shape[1] for one in examples]),
            t=torch.tensor([one.t for one in examples]),
            at=torch.cat([b * n + one.at for b, one in enumerate(examples)]),
            target=torch.cat([one.target for one in examples]),
            weight=torch.cat([one.weight for one in examples]),
            ends=torch.cat([one.ends for one in examples]),
            given=Given.of(conditions) if conditions else None,
        )

    def on(self, device: torch.device) -> "MicroBatch":
        """The same on a device; a copy from pinned memory overlaps with the device's work."""
        return self if device.type == "cpu" else self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def padded(self, multiple: int, least: int = 0) -> "MicroBatch":
        """The same with M, or `least`, rounded up to a multiple: row 0 is scored again with weight 0."""
        more = -(-max(least, len(self.at)) // multiple) * multiple - len(self.at)
        return replace(
            self,
            at=F.pad(self.at, (0, more)),
            target=F.pad(self.target, (0, more), value=FIRST_TEXT_ID),
            weight=F.pad(self.weight, (0, more)),
            ends=F.pad(self.ends, (0, more)),
        )

    def in_buckets(self) -> "MicroBatch":
        """The same in shapes that one compiled graph serves: rows, sequences and scored rows rounded up, and positions
        and visible rows of each sequence, also where all share them. Sequences of conditions keep their number.
        """
        b, n = self.rows.tokens.shape
        more, longest = 0 if self.given is not None else -b % SEQUENCES_BUCKET, -(-n // ROWS_BUCKET) * ROWS_BUCKET
        rows = (0, longest - n, 0, more)
        visible = torch.eye(longest, dtype=torch.bool).repeat(b + more, 1, 1)  # padding sees itself alone
        visible[:b, :n, :n] |= self.rows.visible
        return replace(
            self,
            rows=Rows(
                tokens=F.pad(self.rows.tokens, rows, value=PAD),
                positions=F.pad(self.rows.positions.expand(b, -1), rows),
                visible=visible,
            ),
            lengths=F.pad(self.lengths, (0, more)),
            t=F.pad(self.t, (0, more)),
            at=self.at // n * longest + self.at % n,
        ).padded(SCORED_BUCKET, least=1)

    def pinned(self) -> "MicroBatch":
        """The same in pinned memory, which a GPU copies asynchronously."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        given = None if self.given is None else Given(*map(change, self.given))
        return replace(self, rows=Rows(*map(change, self.rows)), given=given, **changed)


@dataclass(frozen=True)
class Batch:
    """One process's share of an optimizer step. tokens: of the whole batch, over all processes."""

    parts: tuple[MicroBatch, ...]
    tokens: int


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, stories: int) -> np.ndarray:
    return _generator(seed, 0, epoch).permutation(stories)


def story_indices(seed: int, step: int, batch_size: int, stories: int) -> np.ndarray:
    """Stories of step `step`: every epoch visits each story once, in a new order."""
    first = step * batch_size
    wanted = np.arange(first, first + batch_size)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(wanted // stories):
        here = wanted // stories == epoch
        indices[here] = _epoch_order(seed, int(epoch), stories)[wanted[here] % stories]
    return indices


def make_batch(
    split: Split,
    step: int,
    *,
    seed: int,
    batch_size: int,
    micro_size: int,
    mixture: Mapping[str, float],
    settings: Settings,
    share: tuple[int, int] = (0, 1),
    length_step: int = 1,
) -> Batch:
    """The batch of optimizer step `step` in parts of at most `micro_size` sequences of one objective, shortest first.

    mixture: each objective's share of the stories. share: (rank, processes); every process draws all noise, so that a
    story's noise does not depend on it. Rows are padded to the longest of a part, rounded up to length_step.
    """
    x0 = torch.from_numpy(split.take(story_indices(seed, step, batch_size, len(split))).astype(np.int64))
    noise = _generator(seed, 1, step)
    counts = shares_of_batch(mixture, step, batch_size)
    parts, tokens, (rank, processes) = [], 0, share
    for name, stories in zip(counts, x0.split(list(counts.values())), strict=True):
        examples = OBJECTIVES[name](stories, noise, settings) if len(stories) else []
        tokens += sum(one.tokens for one in examples)
        mine = sorted(examples, key=lambda one: one.rows.tokens.shape[1])[rank::processes]
        parts += [MicroBatch.of(mine[i : i + micro_size], length_step) for i in range(0, len(mine), micro_size)]
    return Batch(tuple(parts), tokens)
