"""The step graph for CUDA as a model under evaluation: its slots as arrays, its passes run by ONNX Runtime."""

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from host.evaluate.scorers import session_of
from host.model.conditions import PICTURE_ROWS, Condition, Given
from host.train.objectives import Example
from shared.tokens import PAD

Made = dict[str, NDArray[np.float16]]


class CudaRows:
    """R requests side by side, each with a slot. A pass keeps all of its rows.

    encoders: by their roles, of a graph whose rows read a memory. given: `reads` and the memory, by input name.
    """

    def __init__(self, step: onnx.ModelProto, encoders: Mapping[str, onnx.ModelProto] | None = None) -> None:
        self._session = session_of(_free_scored(step))
        self._encoders = {role: session_of(graph) for role, graph in (encoders or {}).items()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        slots = [value for value in self._session.get_inputs() if value.name.startswith(("keys.", "values."))]
        self._slots: dict[str, tuple[int, ...]] = {value.name: tuple(value.shape[1:]) for value in slots}
        self.capacity = slots[0].shape[2]
        memory = [value for value in self._session.get_inputs() if value.name.startswith("memory_")]
        self._given: dict[str, tuple[int, ...]] = {value.name: tuple(value.shape[1:]) for value in memory}
        self.empty(1)

    def empty(self, requests: int) -> None:
        """Forget all rows; make slots for so many requests."""
        self.memory = {name: np.zeros((requests, *shape), np.float16) for name, shape in self._slots.items()}
        self.positions = np.zeros((requests, self.capacity), np.int32)
        self.cached = np.zeros(requests, np.int32)
        self.given: dict[str, NDArray[np.int32] | NDArray[np.float16]] = {
            name: np.zeros((requests, *shape), np.float16) for name, shape in self._given.items()
        }
        if self._given:
            reads = np.zeros((requests, next(iter(self._given.values()))[1]), np.int32)
            reads[:, -1] = 1
            self.given["reads"] = reads

    def remember(self, condition: Condition, request: int = 0) -> None:
        """What that request's rows read from now on."""
        first, self.given["reads"][request] = 0, 0
        given = Given.of([condition])
        words, pixels = int((given.tokens != PAD).sum()), given.pixels.numpy().astype(np.float16)
        feeds: dict[str, dict[str, NDArray[np.int32] | NDArray[np.float16]]] = {
            "encode.text": {name: getattr(given, name).numpy().astype(np.int32) for name in given._fields[:3]},
            "encode.image": {"pixels": pixels},
        }
        for role, feed in feeds.items():
            session = self._encoders[role]
            for value in session.get_inputs():
                if value.name != "count":
                    padded = np.zeros(value.shape, feed[value.name].dtype)
                    padded[tuple(map(slice, feed[value.name].shape))] = feed[value.name]
                    feed[value.name] = padded
            if role == "encode.text":
                feed["count"] = np.array([words], np.int32)
            names = [value.name for value in session.get_outputs()]
            for name, made in zip(names, session.run(names, feed), strict=True):
                rows = made.shape[2]
                self.given[name][request, :, first : first + rows] = made[0]
            there = (1 + words) * (words > 0) if role == "encode.text" else PICTURE_ROWS * len(pixels)
            self.given["reads"][request, first : first + there] = 1
            first += rows

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
        made = self._session.run(None, feed | self.memory | self.given)
        return dict(zip(self._outputs, made, strict=True))

    def scores(self, example: Example) -> Tensor:
        """Of every token at an example's targets (M, V); rows before its first scored one are evidence, if any."""
        tokens, positions = (part.numpy().astype(np.int32) for part in example.rows[:2])
        given, n = int(example.at[0]), tokens.shape[1]
        sees = np.arange(1, n + 1, dtype=np.int32)[None]
        sees[:, :given] = given
        self.empty(1)
        if example.condition is not None:
            self.remember(example.condition)
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
