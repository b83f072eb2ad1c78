"""The step graph for CUDA as a model under evaluation: its slots as arrays, its passes run by ONNX Runtime."""

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from host.evaluate.scorers import session_of
from host.train.objectives import Example

Made = dict[str, NDArray[np.float16]]


class CudaRows:
    """R requests side by side, each with a slot. A pass keeps all of its rows."""

    def __init__(self, step: onnx.ModelProto) -> None:
        self._session = session_of(_free_scored(step))
        self._outputs = [value.name for value in self._session.get_outputs()]
        slots = [value for value in self._session.get_inputs() if value.name.startswith(("keys.", "values."))]
        self._slots: dict[str, tuple[int, ...]] = {value.name: tuple(value.shape[1:]) for value in slots}
        self.capacity = slots[0].shape[2]
        self.empty(1)

    def empty(self, requests: int) -> None:
        """Forget all rows; make slots for so many requests."""
        self.memory = {name: np.zeros((requests, *shape), np.float16) for name, shape in self._slots.items()}
        self.positions = np.zeros((requests, self.capacity), np.int32)
        self.cached = np.zeros(requests, np.int32)

    def run(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        *,
        sees: NDArray[np.int32],
        scored: NDArray[np.int32],
    ) -> Made:
        """A pass of rows (R, N) behind the kept ones; scored (R, M): counted over all requests. → outputs by name"""
        feed = {"tokens": tokens, "positions": positions, "sees": sees, "cached": self.cached}
        feed |= {"key_positions": self.positions, "scored": scored}
        made = self._session.run(None, feed | self.memory)
        return dict(zip(self._outputs, made, strict=True))

    def scores(self, example: Example) -> Tensor:
        """Of every token at an example's targets (M, V); rows before its first scored one are evidence, if any."""
        tokens, positions = (part.numpy().astype(np.int32) for part in example.rows[:2])
        given, n = int(example.at[0]), tokens.shape[1]
        sees = np.arange(1, n + 1, dtype=np.int32)[None]
        sees[:, :given] = given
        self.empty(1)
        made = self.run(tokens, positions, sees=sees, scored=example.at.numpy().astype(np.int32)[None])
        return torch.from_numpy(made["logits"][0]).float()


def _free_scored(step: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with as many scored rows as an evaluation wants."""
    free = onnx.ModelProto()
    free.CopyFrom(step)
    for value in (*free.graph.input, *free.graph.output):
        if value.name in ("scored", "logits", "states"):
            value.type.tensor_type.shape.dim[1].dim_param = "scored"
    return free
