"""ONNX Runtime on the CPU, for blocks with conditions: the encoders, and the graphs whose rows read a memory.

Nothing is read from disk until the first request with a condition.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge.backends.ort_session import Graphs, check_names
from edge.decoding.conditions import Condition
from edge.decoding.types import Floats
from edge.system.locked import Locked
from shared.errors import BundleError, one_line
from shared.manifest import Manifest, Role

PLAIN: Final = "plain_"
"""Prefix of the caches of rows that read no memory, in the guided graph."""
ENCODERS: Final[dict[Role, tuple[str, ...]]] = {
    "encode.text": ("tokens", "places", "words"),
    "encode.image": ("pixels",),
}
"""In the order of what they make in the memory."""
MEMORY: Final[Role] = "encode.memory"


@dataclass
class Remembered:
    """What a slot is conditioned on. role: of the graph of its passes. memory: what each layer reads, by input name;
    plain: caches of the rows that read none, likewise. passes: as in `ort_rows`.
    """

    role: Role
    memory: dict[str, NDArray[Any]]
    guidance: Floats  # ()
    plain: dict[str, Floats]
    passes: dict[tuple[int, int, int], Any] = field(default_factory=dict)

    def hide(self, rows: NDArray[np.bool_], heads: int) -> None:
        """Let no layer read these of the memory's first rows any more. In place: passes are bound to the arrays."""
        for name, bias in self.memory.items():
            if name.startswith("memory_bias."):
                bias.reshape(heads, -1)[:, : rows.size][:, rows] = -np.inf


class OrtConditions:
    """Encoders and conditioned graphs of a bundle. A graph is checked as it is loaded."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.graphs = Graphs(folder, manifest)
        self.fills_gaps = self.graphs.has("prefill.conditioned")
        layers = range(manifest.model.layers)
        kinds, scales = ("keys", "bias", "values"), ("key_scales", "value_scales")
        self._read, self._scales = ({f"memory_{k}.{i}" for i in layers for k in part} for part in (kinds, scales))
        self._loaded: Locked[set[Role]] = Locked(set())

    def load(self, condition: Condition, check: Callable[[Role], None]) -> None:
        """Load the graphs that a condition needs, unless they are loaded. check: of a conditioned step graph.

        Raises BundleError for a graph that is damaged, has other inputs and outputs, or does not run.
        """
        needed = [encoder for encoder in ENCODERS if _needs(encoder, condition)]
        needed.append(MEMORY)
        needed.append("step.guided" if condition.guidance else "step.conditioned")
        if self.fills_gaps:
            needed.append("prefill.conditioned")
        with self._loaded as loaded:  # others that need the same wait here, and find it loaded
            for role in needed:
                if role in loaded:
                    continue
                try:
                    if role in ENCODERS:
                        self._check(role)
                        self._encoded(role, condition)
                    elif role == MEMORY:
                        self._check(role)
                        self.remember(condition, {})
                    else:
                        check(role)
                except BundleError:
                    raise
                except Exception as error:  # onnxruntime raises types of its own that share no public base
                    raise BundleError(f"{self.graphs.file(role)} does not run: {one_line(str(error))}") from None
                loaded.add(role)

    def remember(self, condition: Condition, plain: dict[str, Floats]) -> Remembered:
        """Run the encoders. plain: zeroed caches for the rows without a memory, used where there is guidance."""
        role: Role = "step.guided" if condition.guidance else "step.conditioned"
        parts = [self._encoded(encoder, condition) for encoder in ENCODERS if _needs(encoder, condition)]
        session = self.graphs.open(MEMORY, 1)
        made = session.run(None, {"memory": np.concatenate(parts, axis=1)})
        memory = {output.name: array for output, array in zip(session.get_outputs(), made, strict=True)}
        return Remembered(role, memory, np.array(condition.guidance, np.float32), plain)

    def memory_names(self) -> set[str]:
        """What the graphs of passes read of a memory."""
        return {output.name for output in self.graphs.open(MEMORY, 1).get_outputs()}

    def inputs_of(self, role: Role, remembered: Remembered) -> dict[str, NDArray[Any]]:
        """The memory as a graph of that role reads it."""
        read = {value.name for value in self.graphs.open(role, 1).get_inputs()}
        return {name: array for name, array in remembered.memory.items() if name in read}

    def close(self) -> None:
        """Drop the sessions and their memory."""
        self.graphs.close()

    def _encoded(self, role: Role, condition: Condition) -> Floats:
        """The memory of the words, or that of the pictures.  → (1, R, D)"""
        feed: dict[str, NDArray[Any]]
        if role == "encode.text":
            feed = {name: row[None] for name, row in zip(ENCODERS[role], condition.word_rows(), strict=True)}
        else:
            feed = {"pixels": as_input(condition.pixels)}
        memory: Floats = self.graphs.open(role, 1).run(None, feed)[0]
        return memory

    def _check(self, role: Role) -> None:
        """Of an encoder, or of what makes what layers read: in INT8 with scales."""
        session, file = self.graphs.open(role, 1), self.graphs.file(role)
        if role != MEMORY:
            check_names(file, session, ({*ENCODERS[role]}, {"memory"}))
            return
        scales = self._scales & self.memory_names()
        check_names(file, session, ({"memory"}, self._read | scales))


def _needs(encoder: Role, condition: Condition) -> bool:
    return bool(condition.words) if encoder == "encode.text" else len(condition.pixels) > 0


def as_input(pixels: NDArray[np.uint8]) -> Floats:
    """Pictures (n, S, S, 3) of bytes as (n, 3, S, S) in 0 … 1."""
    scaled: Floats = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    return scaled
