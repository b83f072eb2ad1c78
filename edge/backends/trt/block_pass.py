"""A pass of blocks on a GPU: its shape, and the addresses of what engine and kernels read and write."""

from dataclasses import dataclass
from typing import Any, Final

from edge.decoding.blocks import Writing

ALIGNMENT: Final = 256
"""Bytes, of every address that TensorRT is given."""
Tensors = dict[str, tuple[int, tuple[int, ...]]]
"""Address and shape of an engine's inputs or outputs, by name."""


@dataclass(eq=False)
class Pass:
    """The program of one shape: a step of the first slots, or one request that reads."""

    requests: int
    rows: int
    reading: bool
    fresh_stride: int  # values between two arrays of new keys and values
    context: Any = None
    graph: Any = None

    @property
    def name(self) -> str:
        """See `Program`."""
        return f"{self.requests} × {self.rows} rows"


@dataclass(frozen=True)
class Addresses:
    """Device addresses of what engine and kernels read and write."""

    places: int
    writings: int
    reading: int
    tokens: int
    positions: int
    sees: int
    cached: int
    scored: int
    key_positions: int
    kept: int
    fresh: int
    logits: int
    states: int
    drawn: int


def number_of(w: Writing) -> int:
    """Of its slot."""
    assert w.slot is not None
    number: int = w.slot.memory
    return number


def aligned(count: int) -> int:
    """FP16 values, rounded up to TensorRT's alignment."""
    return -(-2 * count // ALIGNMENT) * ALIGNMENT // 2
