"""The chain drafter's weights on the GPU, and the launches of its kernels: five for each draft.

Its weights are constants of the step graph's file, which the engine does not run. R: places of a pass, D: width,
F: tokens that a draft can be.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge.backends.trt import kernels
from edge.backends.trt.constants import constants_of
from edge.backends.trt.driver import Gpu, Memory
from shared.errors import BundleError
from shared.manifest import ModelSpec

LIKELY: Final = "drafter.likely"
HEAD: Final = frozenset({"token_embedding.weight", "head.weight", "head.weight.int8", "head.weight.scale"})
HEAD_BIAS: Final = "head.bias.rows"

Launch = Callable[[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]], None]


class Drafter:
    """`depth` drafts of each place, one after another."""

    def __init__(self, gpu: Gpu, memory: Memory, *, graph: bytes, model: ModelSpec, depth: int, places: int) -> None:
        """Raises BundleError when the graph's file lacks a weight, or it has another shape."""
        self._gpu, self._memory, self._width, self._depth = gpu, memory, model.d_model, depth
        found = constants_of(graph, HEAD | {HEAD_BIAS}, "drafter.")
        if "head.weight.int8" in found:
            scale = found["head.weight.scale"].astype(np.float32)
            found["head.weight"] = (found["head.weight.int8"] * scale).astype(np.float16)
        d, v = model.d_model, model.vocab_size
        likely = self._checked(found, LIKELY, (found[LIKELY].size,) if LIKELY in found else (0,))
        self._hidden = found["drafter.depths.0.up.bias"].size if "drafter.depths.0.up.bias" in found else 0
        if likely.size == 0 or likely.min() < 0 or likely.max() >= v:
            raise BundleError(f"the step graph for CUDA has no drafter, or one of another vocabulary than {v}")
        self._count = likely.size
        head = np.ascontiguousarray(self._checked(found, "head.weight", (d, v))[:, likely])
        self._embedding = self._uploaded(self._checked(found, "token_embedding.weight", (v, d)))
        self._head = self._uploaded(head)
        self._head_bias = self._uploaded(self._checked(found, HEAD_BIAS, (v,))[likely])
        self._likely = self._uploaded(likely.astype(np.int32))
        self._depths: list[tuple[int, ...]] = []
        shapes = {"up.weight": (2 * d, self._hidden), "up.bias": (self._hidden,)}
        shapes |= {"down.weight": (self._hidden, d), "down.bias": (d,)}
        for i in range(depth):
            b = f"drafter.depths.{i}"
            parts = [f"{b}.norm_{kind}.{part}" for kind in ("state", "token") for part in ("weight", "bias")]
            norms = np.stack([self._checked(found, name, (d,)) for name in parts])
            linear = [self._uploaded(self._checked(found, f"{b}.{name}", shape)) for name, shape in shapes.items()]
            self._depths.append((self._uploaded(norms), *linear))
        self._state, self._both, self._up, self._scores = (
            memory.device(places * count * size)
            for count, size in ((d, 4), (2 * d, 4), (self._hidden, 4), (self._count, 2))
        )

    def launch(self, launch: Launch, requests: int, *, places: int, writings: int, states: int) -> None:
        """Enqueue all drafts of R places. places, writings, states: device addresses."""
        who, m, d = (places, writings), self._depth + 1, self._width
        for i, (norms, up, up_bias, down, down_bias) in enumerate(self._depths):
            pointers = (*who, states, self._embedding, norms, self._state, self._both)
            launch(kernels.DRAFT_INPUT, (requests,), pointers, (m, d, i))
            layers = (
                (kernels.HIDDEN_LAYER, self._both, up, up_bias, self._up, 2 * d, self._hidden),
                (kernels.STATE_LAYER, self._up, down, down_bias, self._state, self._hidden, d),
                (kernels.SCORES_LAYER, self._state, self._head, self._head_bias, self._state, d, self._count),
            )
            for layer, x, weight, bias, out, inputs, outputs in layers:
                tiles = -(-outputs // kernels.COLUMNS)
                pointers, numbers = (*who, x, weight, bias, out, self._scores), (inputs, outputs, layer, i, tiles)
                launch(kernels.DRAFT_LINEAR, (tiles, requests), pointers, numbers)
            launch(kernels.DRAFT_TOKEN, (requests,), (*who, self._scores, self._likely), (self._count, i))

    def _uploaded(self, values: NDArray[Any]) -> int:
        values = np.ascontiguousarray(values)
        address = self._memory.device(values.nbytes)
        self._gpu.call("cuMemcpyHtoD", address, values.ctypes.data, values.nbytes)
        return address

    @staticmethod
    def _checked(found: dict[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        if name not in found or found[name].shape != shape:
            has = f"of shape {found[name].shape}" if name in found else "missing"
            raise BundleError(f"the step graph for CUDA: its constant {name} is {has}, not of shape {shape}")
        return found[name]
