"""The graphs of blocks as a model under evaluation: rows of one text behind a cache, run by ONNX Runtime."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray

from host.evaluate.scorers import session_of

LOGITS = "head.scores"  # inside a step graph: of the whole vocabulary


@dataclass
class Rows:
    """Cached rows of one text: arrays by the names of the step graph's inputs, the first len(positions) rows filled."""

    arrays: dict[str, NDArray[np.float32]]
    positions: list[int] = field(default_factory=list)


class RowGraphs:
    """A step graph, and the prefill graph that goes with it."""

    def __init__(self, step: onnx.ModelProto, prefill: onnx.ModelProto | None = None) -> None:
        caches = [value for value in step.graph.input if value.name.startswith(("keys.", "values."))]
        self._shapes = {c.name: [d.dim_value for d in c.type.tensor_type.shape.dim] for c in caches}
        made = {LOGITS: np.float32, "states": np.float32} | {f"new_{name}": np.float32 for name in self._shapes}
        self._step = session_of(step, made)
        self._prefill = session_of(prefill) if prefill is not None else None

    def empty(self, room: int) -> Rows:
        """No rows yet."""
        return Rows({name: np.zeros((1, h, room, d), np.float32) for name, (_, h, _, d) in self._shapes.items()})

    def read_evidence(self, rows: Rows, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Fill an empty cache with rows that all see each other."""
        assert self._prefill is not None
        made = self._prefill.run(None, {"tokens": _row(tokens), "positions": _row(positions)})
        for value, array in zip(self._prefill.get_outputs(), made, strict=True):
            rows.arrays[value.name.removeprefix("new_")][:, :, : len(tokens)] = array
        rows.positions = list(positions)

    def append(
        self, rows: Rows, tokens: Sequence[int], positions: Sequence[int], scored: Sequence[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A pass of causal rows, which stay in the cache.  → scores (M, V) and states (M, D) of the rows `scored`"""
        total = len(rows.positions) + len(tokens)
        rows.positions = [*rows.positions, *positions]
        feed = {
            "tokens": _row(tokens),
            "positions": _row(positions),
            "key_positions": np.array(rows.positions, np.int32),
            "last": np.array([total - 1], np.int32),
            "total": np.array(total, np.int32),
            "scored": np.array(scored, np.int32),
        }
        logits, states, *made = self._step.run(None, feed | rows.arrays)
        rows.arrays = dict(zip(self._shapes, made, strict=True))
        return logits, states


def _row(values: Sequence[int]) -> NDArray[np.int32]:
    return np.array([values], np.int32)
