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


@dataclass
class Remembered:
    """What a slot is conditioned on. role: of the graph of its passes. memory: keys and values of each layer
    (1, H, R, D/H), by input name; plain: caches of the rows that read none, likewise. passes: as in `ort_rows`.
    """

    role: Role
    memory: dict[str, Floats]
    guidance: Floats  # ()
    plain: dict[str, Floats]
    passes: dict[tuple[int, int, int], Any] = field(default_factory=dict)


class OrtConditions:
    """Encoders and conditioned graphs of a bundle. A graph is checked as it is loaded."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.graphs = Graphs(folder, manifest)
        self.fills_gaps = self.graphs.has("prefill.conditioned")
        layers = range(manifest.model.layers)
        self._cache = [f"{kind}.{layer}" for layer in layers for kind in ("keys", "values")]
        self._width, self._heads = manifest.model.d_model // manifest.model.heads, manifest.model.heads
        self._loaded: Locked[set[Role]] = Locked(set())

    def load(self, condition: Condition, check: Callable[[Role], None]) -> None:
        """Load the graphs that a condition needs, unless they are loaded. check: of a conditioned step graph.

        Raises BundleError for a graph that is damaged, has other inputs and outputs, or does not run.
        """
        needed = [encoder for encoder in ENCODERS if _needs(encoder, condition)]
        needed.append("step.guided" if condition.guidance else "step.conditioned")
        if self.fills_gaps:
            needed.append("prefill.conditioned")
        with self._loaded as loaded:  # others that need the same wait here, and find it loaded
            for role in needed:
                if role in loaded:
                    continue
                try:
                    if role in ENCODERS:
                        self._check_encoder(role)
                        self._encoded(role, condition)
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
        memory = {name: np.concatenate([part[name] for part in parts], axis=2) for name in parts[0]}
        return Remembered(role, memory, np.array(condition.guidance, np.float32), plain)

    def inputs_of(self, role: Role, remembered: Remembered) -> dict[str, Floats]:
        """The memory as a graph of that role reads it."""
        read = {value.name for value in self.graphs.open(role, 1).get_inputs()}
        return {name: array for name, array in remembered.memory.items() if name in read}

    def close(self) -> None:
        """Drop the sessions and their memory."""
        self.graphs.close()

    def _encoded(self, role: Role, condition: Condition) -> dict[str, Floats]:
        """The memory of the words, or that of the pictures, by input name."""
        feed: dict[str, NDArray[Any]]
        if role == "encode.text":
            feed = {name: row[None] for name, row in zip(ENCODERS[role], condition.word_rows(), strict=True)}
        else:
            feed = {"pixels": as_input(condition.pixels)}
        session = self.graphs.open(role, 1)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, feed), strict=True))

    def _check_encoder(self, role: Role) -> None:
        session, file = self.graphs.open(role, 1), self.graphs.file(role)
        check_names(file, session, ({*ENCODERS[role]}, {f"memory_{name}" for name in self._cache}))
        for output in session.get_outputs():
            if (output.shape[1], output.shape[3]) != (self._heads, self._width):
                raise BundleError(f"{file} gives {output.name} of shape {output.shape}, of another network")


def _needs(encoder: Role, condition: Condition) -> bool:
    return bool(condition.words) if encoder == "encode.text" else len(condition.pixels) > 0


def as_input(pixels: NDArray[np.uint8]) -> Floats:
    """Pictures (n, S, S, 3) of bytes as (n, 3, S, S) in 0 … 1."""
    scaled: Floats = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    return scaled
