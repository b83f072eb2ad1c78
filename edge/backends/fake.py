"""A backend without a network: deterministic scores, for trying the daemon and testing everything around it."""

import time

import numpy as np

from edge.decoding.types import Ids, Positions, StepResult
from shared.manifest import Manifest
from shared.tokens import FIRST_TEXT_ID


class FakeBackend:
    """The best token of position p is 31·p modulo the text ids; each following id has a nat less."""

    def __init__(self, manifest: Manifest, step_ms: float = 0.0) -> None:
        self.lanes = 8
        self._step_s = step_ms / 1e3
        self._text_ids = manifest.model.vocab_size - FIRST_TEXT_ID
        self._rank = np.arange(manifest.top_k)
        p = np.exp(-self._rank) / np.exp(-self._rank).sum()
        self._logp = np.log(p).astype(np.float32)
        self._entropy = np.float32(-(p * np.log(p)).sum())

    def score(self, canvas: Ids, t: float, positions: Positions, rows: int = 1) -> StepResult:
        """The same scores whatever the canvas holds."""
        time.sleep(self._step_s)
        ids = FIRST_TEXT_ID + (31 * positions[:, None] + self._rank) % self._text_ids
        logp = np.broadcast_to(self._logp, ids.shape)
        return StepResult(ids.astype(np.int32), logp, np.full(positions.size, self._entropy))

    def close(self) -> None:
        """Nothing to free."""
