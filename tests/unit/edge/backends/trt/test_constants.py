"""Constants are read out of a graph's bytes as onnx reads them, however its parts are put together."""

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edge.backends.trt.constants import constants_of
from shared.errors import BundleError

VALUES: dict[str, NDArray[Any]] = {
    "drafter.a": np.arange(12, dtype=np.float16).reshape(3, 4),
    "drafter.b": np.array(7, np.int32),
    "head.weight": np.full((2, 200), -3, np.int8),
    "other": np.ones(5, np.float32),
}


def graph_of(names: list[str]) -> bytes:
    graph = onnx.ModelProto(ir_version=10, producer_name="somebody")
    graph.graph.name = "step"
    graph.graph.node.append(helper.make_node("Add", ["a", "b"], ["c"], name="add"))
    graph.graph.initializer.extend(numpy_helper.from_array(VALUES[name], name) for name in names)
    content: bytes = graph.SerializeToString()
    return content


def test_constants_of_a_graph_and_of_what_is_appended_to_it() -> None:
    content = graph_of(["drafter.a", "other"]) + graph_of(["head.weight", "drafter.b"])
    found = constants_of(content, frozenset({"head.weight"}), "drafter.")
    assert set(found) == {"drafter.a", "drafter.b", "head.weight"}
    for name, value in found.items():
        assert value.dtype == VALUES[name].dtype
        np.testing.assert_array_equal(value, VALUES[name])


def test_constants_of_damaged_bytes_are_refused_in_one_sentence() -> None:
    whole = graph_of(list(VALUES))
    for damaged in (whole[:-3], whole.replace(b"drafter.a", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff"), b"\x3a\x7f"):
        with pytest.raises(BundleError, match="a graph for CUDA has constants that cannot be read"):
            constants_of(damaged, frozenset(), "drafter.")
