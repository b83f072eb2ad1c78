"""Batches as a pure function of (seed, step): nothing to save, so that resuming repeats the run bit for bit."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from host.data.shards import Split
from host.model.diffusion import (
    Corrupted,
    Objective,
    Weighting,
    corrupt,
    counted_tokens,
    low_discrepancy_times,
    token_weight,
)
from host.model.network import NO_PADDING, ends_impossible
from shared.schedule import ScheduleName
from shared.tokens import BOS, FIRST_TEXT_ID, PAD


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@dataclass(frozen=True)
class MicroBatch:
    """Rows of like length, cut to the longest, and what is asked of them. M: scored positions over all rows."""

    canvas: Tensor  # (B, L) int64, what the network sees
    active_len: Tensor  # (B,) positions before the padding
    t: Tensor  # (B,) float32
    at: Tensor  # (M,) int64, i·L + j
    target: Tensor  # (M,) int64
    weight: Tensor  # (M,) float32
    ends: Tensor  # (M,) int64, see `Denoiser.logits`
    causal: bool

    def on(self, device: torch.device) -> "MicroBatch":
        """The same on a device; from pinned memory the copy runs beside what the device does."""
        if device.type == "cpu":
            return self
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in self._tensors().items()})

    def padded(self, multiple: int) -> "MicroBatch":
        """The same with M rounded up to a multiple, by scored positions of no weight: the first behind BOS, as text."""
        more = -len(self.at) % multiple
        return replace(
            self,
            at=F.pad(self.at, (0, more), value=1),
            target=F.pad(self.target, (0, more), value=FIRST_TEXT_ID),
            weight=F.pad(self.weight, (0, more)),
            ends=F.pad(self.ends, (0, more)),
        )

    def pinned(self) -> "MicroBatch":
        """The same in memory that a GPU copies from by itself."""
        return replace(self, **{name: value.pin_memory() for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Batch:
    """What one process takes of an optimizer step. tokens: counted over the whole batch, on all processes."""

    parts: tuple[MicroBatch, ...]
    tokens: int


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, stories: int) -> np.ndarray:
    return _generator(seed, 0, epoch).permutation(stories)


def story_indices(seed: int, step: int, batch_size: int, stories: int) -> np.ndarray:
    """Which stories step `step` trains on: every epoch visits each story once, in an order of its own."""
    first = step * batch_size
    wanted = np.arange(first, first + batch_size)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(wanted // stories):
        here = wanted // stories == epoch
        indices[here] = _epoch_order(seed, int(epoch), stories)[wanted[here] % stories]
    return indices


def make_batch(
    split: Split,
    seed: int,
    step: int,
    batch_size: int,
    micro_size: int,
    objective: Objective,
    schedule: ScheduleName,
    weighting: Weighting = "nelbo",
    share: tuple[int, int] = (0, 1),
    length_step: int = 1,
) -> Batch:
    """The batch of optimizer step `step` in parts of at most `micro_size` rows, shortest rows first.

    One u spreads t over the whole batch, and all its noise is drawn by every process, so that what a story meets does
    not depend on share, (rank, processes). Sorting by active length and cutting there, or at the next multiple of
    length_step, loses nothing, since what is cut is certain.
    """
    x0 = torch.from_numpy(split.take(story_indices(seed, step, batch_size, len(split))).astype(np.int64))
    tokens = int(counted_tokens(x0).sum())
    if objective == "ar":
        whole = Corrupted(x0, (x0 != PAD) & (x0 != BOS), (x0 != PAD).sum(1))
        t, weights = [1.0] * batch_size, torch.ones(batch_size)
    else:
        noise = _generator(seed, 1, step)
        t = low_discrepancy_times(batch_size, float(noise.random()))
        whole = corrupt(x0, torch.from_numpy(noise.random(x0.shape, dtype=np.float32)), t, schedule)
        weights = torch.tensor([token_weight(weighting, schedule, value) for value in t])
    times, (rank, processes) = torch.tensor(t), share
    mine = whole.active_len.argsort(stable=True)[rank::processes]
    parts = []
    for rows in mine.split(micro_size) if len(mine) else ():  # few stories leave some processes none
        longest = min(-int(whole.active_len[rows].max()) // length_step * -length_step, x0.shape[1])
        canvas = whole.xt[rows, :longest]
        at = whole.scored[rows, :longest].flatten().nonzero()[:, 0]
        parts.append(
            MicroBatch(
                canvas=canvas,
                active_len=whole.active_len[rows],
                t=times[rows],
                at=at,
                target=x0[rows, :longest].flatten()[at],
                weight=weights[rows][at // longest],
                ends=torch.full_like(at, NO_PADDING)
                if objective == "ar"
                else ends_impossible(canvas).flatten()[at].long(),
                causal=objective == "ar",
            )
        )
    return Batch(tuple(parts), tokens)
