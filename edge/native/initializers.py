"""The constants of an ONNX file, without the `onnx` package: protobuf, as far as graphs of ours need it.

Fields by their numbers in onnx.proto: ModelProto.graph 7, GraphProto.initializer 5, TensorProto.dims 1, data_type 2,
name 8, raw_data 9.
"""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

GRAPH: Final = 7
INITIALIZER: Final = 5
DIMS, DATA_TYPE, NAME, RAW_DATA = 1, 2, 8, 9
DTYPES: Final = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64}
VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5
LONGEST: Final = 10
"""Bytes of a number of 64 bits. Without a bound, a file of nothing else would be one number, and take for ever."""


def initializers(model: bytes) -> dict[str, NDArray[Any]]:
    """The constants of a model by name, views of its bytes. ValueError for what is no such file."""
    try:
        graphs = [value for number, value in _fields(memoryview(model)) if number == GRAPH]
        tensors = [value for graph in graphs for number, value in _fields(graph) if number == INITIALIZER]
        return dict(_tensor(tensor) for tensor in tensors)
    except (IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"not an ONNX file whose constants can be read: {type(error).__name__}: {error}") from None


def _tensor(message: memoryview) -> tuple[str, NDArray[Any]]:
    dims, dtype, name, raw = list[int](), 0, "", memoryview(b"")
    for number, value in _fields(message):
        if number == DIMS:
            dims += [value] if isinstance(value, int) else _varints(value)
        elif number == DATA_TYPE:
            dtype = value
        elif number == NAME:
            name = str(value, "utf-8")
        elif number == RAW_DATA:
            raw = value
    return name, np.frombuffer(raw, DTYPES[dtype]).reshape(dims)


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: an int, or a memoryview."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size = {FIXED_64: 8, FIXED_32: 4}.get(kind)
        if kind == BYTES:
            size, at = _varint(message, at)
        if size is None or at + size > len(message):
            raise IndexError("a field that ends outside its message")
        yield key >> 3, message[at : at + size]
        at += size


def _varints(message: memoryview) -> Iterator[int]:
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for place in range(LONGEST):
        byte = message[at + place]
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise IndexError("a number of more than 64 bits")
