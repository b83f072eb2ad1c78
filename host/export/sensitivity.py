"""Which linear layers lose most to INT8: the order in which they are left in float when a graph misses its gate."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from host.evaluate.scorers import Canvases
from host.export.cuda_qdq import LEVELS, linear_inputs, linear_layers


@dataclass(frozen=True)
class LayerError:
    """layer: the MatMul's name in the FP16 graph. error: ‖INT8 − float‖ / ‖float‖ of its output, inputs being exact."""

    layer: str
    error: float


def layer_errors(fp16: onnx.ModelProto, canvases: Canvases) -> list[LayerError]:
    """Every linear layer alone, its input scaled by the tensor and its weights by the column; the worst first."""
    layers = linear_layers(gs.import_onnx(fp16))
    exact_weights = {layer.name: layer.inputs[1].values.astype(np.float32) for layer in layers}
    wrong = dict.fromkeys(exact_weights, 0.0)
    total = dict.fromkeys(exact_weights, 0.0)
    for inputs in linear_inputs(fp16, canvases):
        for layer in layers:
            weight = exact_weights[layer.name]
            x = inputs[layer.inputs[0].name].reshape(-1, len(weight))
            exact = x @ weight  # (L, N)
            rounded = _rounded(x, np.abs(x).max()) @ _rounded(weight, np.abs(weight).max(0))
            wrong[layer.name] += float(np.square(rounded - exact).sum())
            total[layer.name] += float(np.square(exact).sum())
    errors = [LayerError(name, (wrong[name] / total[name]) ** 0.5) for name in wrong]
    return sorted(errors, key=lambda e: -e.error)


def print_errors(errors: Sequence[LayerError]) -> None:
    """One line for each layer."""
    print("\nerror of each linear layer alone in INT8, worst first")
    for error in errors:
        print(f"  {error.layer.removesuffix('.matmul'):30} {error.error:7.2%}")


def _rounded(value: NDArray[np.float32], largest: NDArray[np.float32]) -> NDArray[np.float32]:
    scale = np.maximum(largest / LEVELS, np.float32(1e-12))
    result: NDArray[np.float32] = np.rint(value / scale) * scale
    return result
