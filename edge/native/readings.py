"""What each layer reads of a condition, for the compiled library.  D: width, H: heads, M: rows of the memory."""

from collections.abc import Mapping
from ctypes import addressof
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge.native import LANES, Reading
from edge.native.network import NEVER, SHARE, NotKnownError, matrix_of

HIDDEN: Final = 1e6 * NEVER  # added to the scores of rows that are not read


class Readings:
    """Of all layers. memory: keys (D, H · M) and values (H · M, D) in int8, their scales and what is added to scores,
    by the names of a step graph's inputs. NotKnownError for another memory. most: scores of a row in a layer.
    """

    def __init__(self, memory: Mapping[str, NDArray[Any]], *, layers: int, heads: int, width: int) -> None:
        self._memory, self._biases, self._alive = memory, list[NDArray[np.float32]](), list[Any]()
        made = [self._reading(layer, heads, width) for layer in range(layers)]
        self._structures = (Reading * layers)(*made)
        self.address = addressof(self._structures)
        self.most: int = max(reading.keys.outputs for reading in made)
        self.hide()

    def hide(self) -> None:
        """Take over what is added to scores, of which some is −∞ since."""
        for layer, bias in enumerate(self._biases):
            given = self._memory[f"memory_bias.{layer}"]
            bias[: given.size] = np.maximum(given, HIDDEN)

    def _take(self, name: str, dtype: type, *shape: int) -> NDArray[Any]:
        found = self._memory.get(name)
        if found is None or found.dtype != dtype or found.shape != shape:
            has = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise NotKnownError(f"{name} is {has}, not {np.dtype(dtype)} {list(shape)}")
        return found

    def _reading(self, layer: int, heads: int, width: int) -> Reading:
        rows = np.size(self._memory.get(f"memory_bias.{layer}", ())) // heads
        if not rows:
            raise NotKnownError("a memory without rows")
        keys = self._take(f"memory_keys.{layer}", np.int8, width, heads * rows)
        key_scales = self._take(f"memory_key_scales.{layer}", np.float32, heads * rows)
        self._take(f"memory_bias.{layer}", np.float32, heads * rows)
        bias = np.zeros(-(-heads * rows // LANES) * LANES, np.float32)
        scales = np.pad(key_scales, (0, bias.size - key_scales.size))
        of_keys, alive = matrix_of(keys, scales, bias)
        self._biases.append(alive[-1])
        values, more = matrix_of(
            self._take(f"memory_values.{layer}", np.int8, heads * rows, width),
            self._take(f"memory_value_scales.{layer}", np.float32, width),
            np.zeros(width, np.float32),
        )
        values.input_scale = SHARE
        self._alive += alive + more
        return Reading(of_keys, values, rows)
