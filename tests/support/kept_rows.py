"""What the device's kernel does with the rows of a pass of the step graph for CUDA that are kept."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from host.evaluate.cuda_rows import CudaRows, Made


def keep(graph: CudaRows, made: Made, positions: NDArray[np.int32], counts: Sequence[int]) -> None:
    """Append the first so many rows of each request to its slot."""
    for r, count in enumerate(counts):
        first, end = graph.cached[r], graph.cached[r] + count
        for name, memory in graph.memory.items():
            memory[r, :, first:end] = made[f"new_{name}"][r, :, :count]
        graph.positions[r, first:end] = positions[r, :count]
        graph.cached[r] = end
