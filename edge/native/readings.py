"""What each layer reads of a condition, for the compiled library.  D: width, H: heads, M: rows of the memory."""

from collections.abc import Mapping
from ctypes import addressof
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge.native import LANES, Reading
from edge.native.network import NEVER, SHARE, matrix_of

HIDDEN: Final = 1e6 * NEVER  # added to the scores of rows that are not read


class Readings:
    """Of all layers. memory: keys (D, H · M) and values (H · M, D) in int8, their scales and what is added to scores,
    by the names of a step graph's inputs.
    """

    def __init__(self, memory: Mapping[str, NDArray[Any]], *, layers: int, heads: int) -> None:
        self._memory, self._biases, self._alive = memory, list[NDArray[np.float32]](), list[Any]()
        self._structures = (Reading * layers)(*(self._reading(layer, heads) for layer in range(layers)))
        self.address = addressof(self._structures)
        self.most = max(reading.keys.outputs for reading in self._structures)
        self.hide()

    def hide(self) -> None:
        """Take over what is added to scores, of which some is −∞ since."""
        for layer, bias in enumerate(self._biases):
            given = self._memory[f"memory_bias.{layer}"]
            bias[: given.size] = np.maximum(given, HIDDEN)

    def _reading(self, layer: int, heads: int) -> Reading:
        keys, key_scales = self._memory[f"memory_keys.{layer}"], self._memory[f"memory_key_scales.{layer}"]
        bias = np.zeros(-(-keys.shape[1] // LANES) * LANES, np.float32)
        scales = np.pad(key_scales, (0, bias.size - key_scales.size))
        of_keys, alive = matrix_of(keys, scales, bias)
        self._biases.append(alive[-1])
        values, more = matrix_of(
            self._memory[f"memory_values.{layer}"],
            self._memory[f"memory_value_scales.{layer}"],
            np.zeros(keys.shape[0], np.float32),
        )
        values.input_scale = SHARE
        self._alive += alive + more
        return Reading(of_keys, values, keys.shape[1] // heads)
