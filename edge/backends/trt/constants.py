"""Reads the constants of an ONNX graph out of its bytes: the kernels draft with weights that the engine does not run.

A reader of Protocol Buffers for the four messages on the way (onnx.proto: ModelProto, GraphProto, TensorProto), since
the edge has no onnx.
"""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import BundleError

GRAPH, INITIALIZER = 7, 5  # of ModelProto, of GraphProto
DIMS, DATA_TYPE, NAME, RAW_DATA = 1, 2, 8, 9  # of TensorProto
DTYPES: Final = {1: np.float32, 3: np.int8, 6: np.int32, 10: np.float16}
VARINT, BYTES = 0, 2
FIXED: Final = {1: 8, 5: 4}  # wire types of a fixed number of bytes


def constants_of(model: bytes, names: frozenset[str], prefix: str) -> dict[str, NDArray[Any]]:
    """The constants that have one of these names, or begin with `prefix`. Raises BundleError for damaged bytes."""
    found: dict[str, NDArray[Any]] = {}
    try:
        for graph in _parts(memoryview(model), GRAPH):
            for tensor in _parts(graph, INITIALIZER):
                name = b"".join(_parts(tensor, NAME)).decode()
                if name in names or name.startswith(prefix):
                    found[name] = _array(tensor)
    except (IndexError, KeyError, ValueError) as error:
        raise BundleError(f"a graph for CUDA has constants that cannot be read: {error!r}") from None
    return found


def _array(tensor: memoryview) -> NDArray[Any]:
    fields = list(_fields(tensor))
    dims = [value for number, value in fields if number == DIMS]
    shape = [int(d) for d in dims if isinstance(d, int)] or [int(n) for d in dims for n in _varints(d)]
    kind = next(int(value) for number, value in fields if number == DATA_TYPE and isinstance(value, int))
    raw = b"".join(value for number, value in fields if number == RAW_DATA and isinstance(value, memoryview))
    return np.frombuffer(raw, DTYPES[kind]).reshape(shape)


def _parts(message: memoryview, wanted: int) -> Iterator[memoryview]:
    return (value for number, value in _fields(message) if number == wanted and isinstance(value, memoryview))


def _varints(packed: int | memoryview) -> Iterator[int]:
    assert isinstance(packed, memoryview)
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field: a number, or bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        length, at = _varint(message, at) if key & 7 == BYTES else (FIXED[key & 7], at)
        if at + length > len(message):
            raise ValueError("a field is longer than what is left")
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
