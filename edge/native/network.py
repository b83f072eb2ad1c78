"""A bundle's INT8 step and draft graphs as the compiled library reads them.

The graphs are those that ONNX Runtime runs, and nothing else is in the bundle: their constants are known by name and
shape, so a graph with other constants is refused here, and ONNX Runtime runs it. Its nodes are not read.
D: width, V: vocabulary, K, N: inputs and outputs of a product.
"""

from collections.abc import Mapping, Sequence
from ctypes import Structure
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge.native import LANES, Block, Depth, Drafter, Matrix, Network, Norm
from shared.manifest import ModelSpec

Arrays = Mapping[str, NDArray[Any]]
Floats = NDArray[np.float32]
COLUMNS: Final = 64  # of a tile in `products.h`
HEAD_WIDTHS: Final = (32, 64)
NEVER: Final = -10000.0  # as in `types.h`
SHARE: Final = 1 / 255  # of shares in uint8


class NotKnownError(Exception):
    """A graph that the library cannot run; the reason in a few words."""


class _Reader:
    """Takes constants out of a graph, checks their shapes, and keeps what the structures point to alive."""

    def __init__(self, constants: Arrays) -> None:
        self.left = dict(constants)
        self.alive: list[Any] = []

    def take(self, name: str, dtype: type, *shape: int) -> NDArray[Any]:
        found = self.left.pop(name, None)
        if found is None or found.dtype != dtype or found.shape != shape:
            has = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise NotKnownError(f"{name} is {has}, not {np.dtype(dtype)} {list(shape)}")
        return found

    def keep(self, array: NDArray[Any]) -> int:
        """Its address, for as long as this lives. In a file it lies at any byte: then it is copied."""
        array = np.require(array, requirements=("C", "ALIGNED"))
        self.alive.append(array)
        return array.ctypes.data

    def address(self, name: str, dtype: type, *shape: int) -> int:
        return self.keep(self.take(name, dtype, *shape))

    def norm(self, name: str, width: int) -> Norm:
        return Norm(*(self.address(f"{name}.{part}", np.float32, width) for part in ("weight", "bias")))

    def matrix(self, name: str, inputs: int, *, outputs: int, dynamic: bool = False, biased: bool = True) -> Matrix:
        """dynamic: each row of inputs has a scale of its own, made at run time."""
        weights = self.take(f"{name}.int8", np.int8, inputs, outputs)
        if inputs % 4 or outputs % LANES:
            raise NotKnownError(f"{name} has {inputs} inputs and {outputs} outputs")
        if self.take(f"{name}.zero", np.int8, outputs).any():
            raise NotKnownError(f"{name} has weights around other numbers than 0")
        scale, zero = (0.0, 0) if dynamic else self.input_scale(name)
        scales = self.take(f"{name}.scale", np.float32, outputs)
        bias = self.take(f"{name}.bias", np.float32, outputs) if biased else np.zeros(outputs, np.float32)
        matrix, alive = matrix_of(weights, scales, bias)
        self.alive += alive
        matrix.input_scale, matrix.input_zero = scale, zero
        return matrix

    def input_scale(self, name: str) -> tuple[float, int]:
        """Scale and zero point of a product's inputs."""
        scale = self.take(f"{name}.in.scale", np.float32, 1)
        return float(scale[0]), int(self.take(f"{name}.in.zero", np.uint8, 1)[0])

    def all(self, made: Sequence[Structure]) -> Any:
        """Structures of one kind, one after another."""
        array = (type(made[0]) * len(made))(*made)
        self.alive.append(array)
        return array

    def finish(self, *known: str) -> None:
        """NotKnownError where constants are left that are not read."""
        left = self.left.keys() - set(known)
        if left:
            raise NotKnownError(f"it has {min(left)} as well")


def matrix_of(weights: NDArray[np.int8], scales: Floats, bias: Floats) -> tuple[Matrix, list[Any]]:
    """Weights (K, N) as the library multiplies by them, inputs and outputs filled up with zeros, and what it points to.

    Inputs are filled up to a multiple of LANES, outputs likewise; scales and bias are long enough already.
    """
    inputs, outputs = (-(-size // LANES) * LANES for size in weights.shape)
    tiles = np.zeros((inputs, -(-outputs // COLUMNS) * COLUMNS), np.int8)
    tiles[: weights.shape[0], : weights.shape[1]] = weights
    sums = tiles.sum(0, dtype=np.int32)
    tiles = tiles.reshape(inputs // 4, 4, -1, COLUMNS).transpose(2, 0, 3, 1)
    alive = [np.require(array, requirements=("C", "ALIGNED")) for array in (tiles, sums, scales, bias)]
    return Matrix(*(array.ctypes.data for array in alive), 0.0, 0, inputs, outputs), alive


def read_network(constants: Arrays, model: ModelSpec) -> tuple[Network, list[Any]]:
    """The network of a step graph, and what it points to. Raises NotKnownError."""
    d, places = model.d_model, 2 * model.canvas_len - 1
    if d % model.heads or d // model.heads not in HEAD_WIDTHS:
        raise NotKnownError(f"its heads are {d / model.heads:g} wide")
    r = _Reader(constants)
    if int(r.take("farthest", np.int32, 1)[0]) != model.canvas_len - 1:
        raise NotKnownError("its distances do not begin at the farthest key")
    blocks = [
        Block(
            *(r.norm(f"{b}.{name}", d) for name in ("norm1", "norm2")),
            r.matrix(f"{b}.qkv", d, outputs=3 * d),
            r.matrix(f"{b}.attention_out", d, outputs=d),
            r.matrix(f"{b}.up", d, outputs=4 * d),
            r.matrix(f"{b}.down", 4 * d, outputs=d),
        )
        for b in (f"blocks.{layer}" for layer in range(model.layers))
    ]
    network = Network(
        d,
        model.heads,
        model.layers,
        model.canvas_len - 1,
        r.address("token_embedding.int8", np.int8, model.vocab_size, d),
        r.address("token_embedding.scale", np.float32, model.vocab_size, 1),
        r.address("position_embedding.weight", np.float32, model.canvas_len, d),
        r.keep(np.pad(r.take("relative_bias.columns", np.float32, places, model.heads).T, ((0, 0), (0, LANES + 1)))),
        r.all(blocks),
        r.norm("norm", d),
        r.matrix("head", d, outputs=model.vocab_size),
    )
    r.finish("first_row", "column", "axis_0")
    return network, r.alive


def read_drafter(constants: Arrays, model: ModelSpec, depths: int) -> tuple[Drafter, list[Any]]:
    """The drafter of a draft graph, and what it points to. Raises NotKnownError."""
    d, r = model.d_model, _Reader(constants)
    likely = np.arange(model.vocab_size, dtype=np.int32)
    if "likely" in constants:
        likely = r.take("likely", np.int32, constants["likely"].size)
        if not 0 < likely.size <= model.vocab_size or likely.min() < 0 or likely.max() >= model.vocab_size:
            raise NotKnownError("it drafts tokens that are none")
    hidden = int(np.size(constants.get("drafter.depths.0.known.scale", ())))
    steps = []
    for depth in range(depths):
        b, tokens = f"drafter.depths.{depth}", len(likely) if depth else model.vocab_size
        steps.append(
            Depth(
                r.address(f"{b}.known.int8", np.int8, tokens, hidden),
                r.address(f"{b}.known.scale", np.float32, hidden),
                r.norm(f"{b}.norm_state", d),
                r.matrix(f"{b}.up", d, outputs=hidden, dynamic=True, biased=False),
                r.matrix(f"{b}.down", hidden, outputs=d, dynamic=True),
            )
        )
    head = r.matrix("head", d, outputs=len(likely), dynamic=True)
    r.finish(*(f"drafter.depths.{depth}.number" for depth in range(depths)))
    return Drafter(depths, d, hidden, r.keep(likely), r.all(steps), head), r.alive


def read_conditioned(
    constants: Arrays, plain: Arrays, network: Network, *, best: int | None
) -> tuple[Network, list[Any]]:
    """The network of a conditioned step graph: that of the plain one, but for the scales of what products multiply.

    best: tokens that it keeps, where it is a guided one. Raises NotKnownError.
    """
    for name, array in plain.items():
        other = constants.get(name)
        if other is None or not (np.array_equal(array, other) or name.endswith((".in.scale", ".in.zero"))):
            raise NotKnownError(f"{name} is not that of the step graph")
    fixed = {"share.scale": [float(np.float32(SHARE))], "share.zero": [0]}
    fixed |= {"by_head": [0, 0, network.heads, -1], "side_by_side": [0, 0, -1]}
    if best is not None:
        fixed |= {"k": [best], "last_of_best": [best - 1], "never": [NEVER], "axes_2_3": [2, 3]}
    added = {name: constants[name].tolist() for name in constants.keys() - plain.keys()}
    for name in sorted(added.keys() | fixed.keys()):
        if added.get(name) != fixed.get(name):
            raise NotKnownError(f"{name} is {added.get(name, 'not there')}")
    r = _Reader(constants)
    made = Network.from_buffer_copy(network)
    blocks = (Block * network.layers)(*network.blocks[: network.layers])
    for layer, block in enumerate(blocks):
        for part in ("qkv", "attention_out", "up", "down"):
            matrix = getattr(block, part)
            matrix.input_scale, matrix.input_zero = r.input_scale(f"blocks.{layer}.{part}")
    made.head.input_scale, made.head.input_zero = r.input_scale("head")
    made.blocks = blocks
    return made, [blocks]
