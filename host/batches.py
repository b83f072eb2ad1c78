"""Batches as a pure function of (seed, step): nothing to save, so that resuming repeats the run bit for bit."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from host.diffusion import Corrupted, corrupt, low_discrepancy_times
from host.shards import Split
from shared.schedule import ScheduleName
from shared.tokens import PAD


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@dataclass(frozen=True)
class MicroBatch:
    """Rows of like length, cut to the longest. x0 (B, L) int64; corrupted is None for the autoregressive objective."""

    x0: Tensor
    t: list[float]
    corrupted: Corrupted | None


def story_indices(seed: int, step: int, batch_size: int, stories: int) -> np.ndarray:
    """Which stories step `step` trains on: every epoch visits each story once, in an order of its own."""
    first = step * batch_size
    wanted = np.arange(first, first + batch_size)
    indices = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(wanted // stories):
        here = wanted // stories == epoch
        indices[here] = _generator(seed, 0, int(epoch)).permutation(stories)[wanted[here] % stories]
    return indices


def micro_batches(
    split: Split, seed: int, step: int, batch_size: int, micro_size: int, schedule: ScheduleName | None
) -> Iterator[MicroBatch]:
    """The batch of optimizer step `step` in parts of at most `micro_size` rows, shortest rows first.

    schedule None: clean rows for the autoregressive objective. One u spreads t over the whole batch; sorting by
    active length and cutting there loses nothing, since what is cut is certain.
    """
    x0 = torch.from_numpy(split.take(story_indices(seed, step, batch_size, len(split))).astype(np.int64))
    if schedule is None:
        lengths = (x0 != PAD).sum(1)
        for part in lengths.argsort(stable=True).split(micro_size):
            yield MicroBatch(x0[part, : int(lengths[part].max())], [], None)
        return
    noise = _generator(seed, 1, step)
    t = low_discrepancy_times(batch_size, float(noise.random()))
    whole = corrupt(x0, torch.from_numpy(noise.random(x0.shape, dtype=np.float32)), t, schedule)
    for part in whole.active_len.argsort(stable=True).split(micro_size):
        longest = int(whole.active_len[part].max())
        yield MicroBatch(
            x0[part, :longest],
            [t[i] for i in part.tolist()],
            Corrupted(whole.xt[part, :longest], whole.scored[part, :longest], whole.active_len[part]),
        )
