"""A backend without a network: deterministic scores, for trying the daemon and testing everything around it."""

import time

import numpy as np
from numpy.typing import NDArray

from edge.backends import StepResult
from shared.manifest import Manifest
from shared.tokens import FIRST_TEXT_ID


class FakeBackend:
    """Position p prefers token p·31 modulo the vocabulary's text, the next ids a nat less each."""

    def __init__(self, manifest: Manifest, step_ms: float = 0.0) -> None:
        self.lengths: tuple[int, ...] = (manifest.model.canvas_len,)
        self.batches: tuple[int, ...] = (1, 2, 4, 8)
        self._step_s = step_ms / 1e3
        length, k = manifest.model.canvas_len, manifest.top_k
        text_ids = manifest.model.vocab_size - FIRST_TEXT_ID
        rank = np.arange(k)
        ids = FIRST_TEXT_ID + (31 * np.arange(length)[:, None] + rank) % text_ids
        p = np.exp(-rank) / np.exp(-rank).sum()
        self._ids = ids.astype(np.int32)  # (L, K)
        self._logp = np.broadcast_to(np.log(p), (length, k)).astype(np.float32)
        self._entropy = np.full(length, -(p * np.log(p)).sum(), np.float32)

    def step(self, canvas: NDArray[np.int32], t: NDArray[np.float32], wanted: NDArray[np.bool_]) -> StepResult:
        """The same scores whatever the canvas holds."""
        time.sleep(self._step_s)
        b = canvas.shape[0]
        return StepResult(
            np.broadcast_to(self._ids, (b, *self._ids.shape)),
            np.broadcast_to(self._logp, (b, *self._logp.shape)),
            np.broadcast_to(self._entropy, (b, *self._entropy.shape)),
        )

    def close(self) -> None:
        """Nothing to free."""
