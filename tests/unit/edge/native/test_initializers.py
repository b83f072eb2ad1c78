"""The constants of an ONNX file are those that the `onnx` package reads; a damaged file is refused, and soon."""

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from edge.native.initializers import initializers
from tests.support.compiled import SHIPPED


def small() -> bytes:
    constants = [numpy_helper.from_array(np.arange(6, dtype=d).reshape(2, 3), d) for d in ("float32", "int8", "int64")]
    graph = helper.make_graph([], "graph", [], [], initializer=constants)
    made: bytes = helper.make_model(graph).SerializeToString()
    return made


SMALL = small()


FILES = [file for file in sorted(SHIPPED.glob("*.cpu.*.onnx")) if file.name.startswith(("step", "prefill", "draft"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_initializers_are_those_that_onnx_reads(file: Path) -> None:
    content = file.read_bytes()
    found = initializers(content)
    wanted = {one.name: numpy_helper.to_array(one) for one in onnx.load_from_string(content).graph.initializer}
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert np.array_equal(found[name], array, equal_nan=array.dtype.kind == "f"), name


def test_initializers_whose_values_are_not_raw_are_refused() -> None:
    """Those of the canvas graph are not, which the library does not run."""
    with pytest.raises(ValueError, match="reshape"):
        initializers((SHIPPED / "canvas.cpu.int8.onnx").read_bytes())


def read_or_refused(content: bytes) -> None:
    """No other exception than ValueError."""
    try:
        found = initializers(content)
    except ValueError:
        return
    assert sum(array.nbytes for array in found.values()) <= len(content)  # views: nothing multiplies


@given(st.binary(max_size=200))
def test_initializers_of_any_bytes_are_read_or_refused(content: bytes) -> None:
    read_or_refused(content)


@given(st.integers(0, len(SMALL)))
def test_initializers_of_a_file_that_ends_early_are_read_or_refused(end: int) -> None:
    read_or_refused(SMALL[:end])


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_initializers_of_a_file_with_other_bytes_are_read_or_refused(changes: list[tuple[int, int]]) -> None:
    content = bytearray(SMALL)
    for place, value in changes:
        content[place] = value
    read_or_refused(bytes(content))


def varint(value: int) -> bytes:
    return bytes([*((value >> 7 * i & 0x7F) | 0x80 for i in range(9)), value >> 63])


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def constant(content: bytes) -> bytes:
    """A model with one initializer of these fields."""
    return field(7, field(5, content))


@pytest.mark.parametrize(
    "content",
    [
        constant(b"\x08" + varint(2**63)),  # a dimension below 0
        constant(b"\x08" + varint(2**62) + b"\x10\x01"),
        constant((b"\x08" + varint(2**40)) * 2 + b"\x10\x01"),
        constant(b"\x08\x01" * 100 + b"\x10\x03" + field(9, b"x")),  # more dimensions than an array has
        constant(b"\x40" + varint(2**40)),  # a name that is a number: not as many bytes
        constant(b"\x10\x63"),  # a type that there is none of
        constant(b"\x12" + varint(2**63)),  # longer than the file
        constant(b"\x10\x01\x08\x02" + field(9, b"12345")),  # bytes that are no whole number of values
        constant(field(8, b"\xff")),  # a name that is no text
        constant(b"\x48" + varint(5)),  # bytes that are a number
        b"\x38" + varint(5),  # a graph that is one
    ],
    ids=range(11),
)
def test_initializers_of_hostile_fields_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        initializers(content)


def test_initializers_of_an_endless_number_are_refused_at_once() -> None:
    """Else its bytes are shifted into one integer, in time that grows with their square."""
    started = time.perf_counter()
    with pytest.raises(ValueError, match="more than 64 bits"):
        initializers(b"\x80" * 2_000_000)
    assert time.perf_counter() - started < 1
