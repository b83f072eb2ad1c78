"""A backend without a network: deterministic scores, for trying the daemon and testing everything around it."""

import time

import numpy as np

from edge.decoding.blocks import Law, RowScores, Slot, draw
from edge.decoding.conditions import Condition, Remaining
from edge.decoding.types import Floats, Ids, Positions, StepResult
from shared.manifest import Manifest
from shared.messages import MAX_SEGMENTS
from shared.tokens import FIRST_TEXT_ID


class FakeBackend:
    """The best token of position p is 31·p modulo the text ids; each following id has a nat less. All drafts hold.

    A condition adds a number to it: the sum of its words' tokens and of its pictures' bytes.
    """

    def __init__(self, manifest: Manifest, step_ms: float = 0.0) -> None:
        self.lanes = 8
        self.fills_gaps = self.fills_conditioned_gaps = True
        self.depth = 0 if manifest.blocks is None else manifest.blocks.window
        self._capacity = manifest.model.canvas_len + MAX_SEGMENTS
        self._step_s = step_ms / 1e3
        self._vocab_size, self._text_ids = manifest.model.vocab_size, manifest.model.vocab_size - FIRST_TEXT_ID
        self._rank = np.arange(manifest.top_k)
        p = np.exp(-self._rank) / np.exp(-self._rank).sum()
        self._logp = np.log(p).astype(np.float32)
        self._entropy = np.float32(-(p * np.log(p)).sum())

    def score(self, canvas: Ids, t: float, positions: Positions, rows: int = 1) -> StepResult:
        """The same scores whatever the canvas holds."""
        time.sleep(self._step_s)
        ids = self._best(positions)
        return StepResult(ids, np.broadcast_to(self._logp, ids.shape), np.full(positions.size, self._entropy))

    def open_slot(self) -> Slot:
        """Room for positions."""
        return Slot(np.zeros(self._capacity, np.int32), None)

    def load(self, condition: Condition) -> None:
        """Nothing."""

    def encode(self, slot: Slot, condition: Condition) -> None:
        """Keep its number."""
        slot.condition = (sum(map(sum, condition.words)) + int(condition.pixels.sum())) % self._text_ids

    def narrow(self, slot: Slot, remaining: Remaining) -> None:
        """The number stays until nothing is left."""
        if remaining.nothing:
            slot.condition = None

    def prefill(self, slot: Slot, tokens: Ids, positions: Ids) -> None:
        """Nothing is kept but their number."""
        slot.cached = tokens.size

    def rows(self, slot: Slot, tokens: Ids, *, positions: Ids, scored: int, under_way: int = 1) -> RowScores:
        """The state of a row is its position, and the condition's number."""
        time.sleep(self._step_s)
        places, added = positions[-scored:], slot.condition or 0
        states = np.stack([places, np.full_like(places, added)], 1).astype(np.float32)
        return RowScores(self._scores(places.astype(np.intp) + 1, added), states)

    def draft(self, slot: Slot, state: Floats, *, token: int, noise: Floats, law: Law) -> Ids:
        """What the law will draw."""
        return draw(self._scores(int(state[0]) + 2 + np.arange(self.depth), int(state[1])), noise, law)

    def _scores(self, positions: Positions, added: int) -> Floats:
        scores = np.full((positions.size, self._vocab_size), -np.inf, np.float32)
        np.put_along_axis(scores, self._best(positions, added), self._logp, 1)
        return scores

    def _best(self, positions: Positions, added: int = 0) -> Ids:
        ids = FIRST_TEXT_ID + (31 * positions[:, None] + added + self._rank) % self._text_ids
        return ids.astype(np.int32)

    def close(self) -> None:
        """Nothing to free."""
