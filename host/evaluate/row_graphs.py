"""The graphs of blocks as a model under evaluation: rows of one text behind a cache, run by ONNX Runtime."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from host.evaluate.likelihood import HeldOut
from host.evaluate.scorers import session_of
from host.model.conditions import Condition, Given
from host.train.objectives import Example, Settings, ar
from shared.tokens import EOS


@dataclass
class Rows:
    """Cached rows of one text: arrays by the names of the step graph's inputs, the first len(positions) rows filled.

    memory: what the rows read of the text's condition, by the names of the inputs.
    """

    arrays: dict[str, NDArray[np.float32]]
    memory: dict[str, NDArray[Any]] = field(default_factory=dict)
    positions: list[int] = field(default_factory=list)


class RowGraphs:
    """A step graph, and the prefill graph that goes with it; of conditioned ones also the encoders, by their roles."""

    def __init__(
        self,
        step: onnx.ModelProto,
        prefill: onnx.ModelProto | None = None,
        encoders: Mapping[str, onnx.ModelProto] | None = None,
    ) -> None:
        caches = [value for value in step.graph.input if value.name.startswith(("keys.", "values."))]
        self._shapes = {c.name: [d.dim_value for d in c.type.tensor_type.shape.dim] for c in caches}
        self._step = session_of(step)
        self._prefill = session_of(prefill) if prefill is not None else None
        self._encoders = {role: session_of(graph) for role, graph in (encoders or {}).items()}

    def empty(self, room: int, condition: Condition | None = None) -> Rows:
        """No rows yet."""
        arrays = {name: np.zeros((1, h, room + 1, d), np.float32) for name, (_, h, _, d) in self._shapes.items()}
        return Rows(arrays, {} if condition is None else self._remember(condition))

    def _remember(self, condition: Condition) -> dict[str, NDArray[Any]]:
        """What blocks read of a condition's memory: of its words, then of its pictures."""
        given, parts = Given.of([condition]), list[NDArray[np.float32]]()
        feeds = {
            "encode.text": {name: getattr(given, name).numpy().astype(np.int32) for name in given._fields[:3]},
            "encode.image": {"pixels": given.pixels.numpy()},
        }
        for role, empty in (("encode.text", not condition.words), ("encode.image", not len(given.pixels))):
            if not empty:
                parts += self._encoders[role].run(["memory"], feeds[role])
        session = self._encoders["encode.memory"]
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, {"memory": np.concatenate(parts, 1)}), strict=True))

    def read_evidence(self, rows: Rows, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Fill an empty cache with rows that all see each other."""
        assert self._prefill is not None
        read = {value.name for value in self._prefill.get_inputs()}
        memory = {name: array for name, array in rows.memory.items() if name in read}
        made = self._prefill.run(None, {"tokens": _row(tokens), "positions": _row(positions)} | memory)
        for value, array in zip(self._prefill.get_outputs(), made, strict=True):
            rows.arrays[value.name.removeprefix("new_")][:, :, : len(tokens)] = array
        rows.positions = list(positions)

    def append(
        self, rows: Rows, tokens: Sequence[int], positions: Sequence[int], scored: Sequence[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A pass of causal rows, which stay in the cache.  → scores (M, V) and states (M, D) of the rows `scored`"""
        first, rows.positions = len(rows.positions), [*rows.positions, *positions]
        if len(tokens) == 1:  # see `host.export.step_graph`: a lone row would be rounded otherwise
            tokens, positions = [*tokens] * 2, [*positions] * 2
        total = first + len(tokens)
        feed = {
            "tokens": _row(tokens),
            "positions": _row(positions),
            "key_positions": np.array([*rows.positions[:first], *positions], np.int32),
            "last": np.array([total - 1], np.int32),
            "total": np.array([total], np.int32),
            "scored": np.array(scored, np.int32),
        }
        logits, states, *made = self._step.run(None, feed | rows.memory | rows.arrays)
        rows.arrays = dict(zip(self._shapes, made, strict=True))
        return logits, states

    def scores(self, example: Example) -> Tensor:
        """Of every token at an example's targets (M, V); rows before its first scored one are evidence, if any."""
        given = int(example.at[0])
        tokens, positions = (part[0].tolist() for part in example.rows[:2])
        rows = self.empty(len(tokens), example.condition)
        if given:
            self.read_evidence(rows, tokens[:given], positions[:given])
        logits, _ = self.append(rows, tokens[given:], positions[given:], range(len(tokens) - given))
        return torch.from_numpy(logits)

    def greedy(self, prompt: Sequence[int], length: int, condition: Condition | None = None) -> list[int]:
        """The likeliest token after the likeliest, from a prompt to an EOS, or up to `length` tokens."""
        rows, text, new = self.empty(length, condition), list(prompt), list(prompt)
        while len(text) < length and text[-1] != EOS:
            positions = range(len(text) - len(new), len(text))
            logits, _ = self.append(rows, new, positions, [len(new) - 1])
            new = [int(logits[0].argmax())]
            text += new
        return text


def left_to_right(held_out: HeldOut) -> list[Example]:
    """Every token of each story, given those before it."""
    x0 = torch.from_numpy(held_out.canvases.astype(np.int64))
    return ar.examples(x0, np.random.default_rng(0), Settings())


def _row(values: Sequence[int]) -> NDArray[np.int32]:
    return np.array([values], np.int32)
