"""Only graphs that are exactly those of `host.export` go to the compiled library; ONNX Runtime runs all others."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from edge.backends import choose_backend
from edge.backends.native_rows import NativeRows, read_networks
from edge.backends.ort_rows import OrtRows
from edge.native.initializers import initializers
from edge.native.network import NotKnownError, read_drafter, read_network
from shared.manifest import Manifest, ModelSpec, Role, read_manifest
from tests.support.altered_bundle import with_graph
from tests.support.compiled import NEEDS_LIBRARY

Constants = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def manifest(int8_blocks_bundle: Path) -> Manifest:
    return read_manifest(int8_blocks_bundle)


@pytest.fixture
def step(int8_blocks_bundle: Path) -> Constants:
    return initializers((int8_blocks_bundle / "step.cpu.int8.onnx").read_bytes())


@pytest.fixture
def draft(int8_blocks_bundle: Path) -> Constants:
    return initializers((int8_blocks_bundle / "draft.cpu.int8.onnx").read_bytes())


UNREAD = {"first_row", "column", "axis_0", *(f"drafter.depths.{n}.number" for n in range(3)), "likely"}
"""Constants that may be absent: without `likely`, all tokens are."""


def read_both(step: Constants, draft: Constants, model: ModelSpec) -> None:
    read_network(step, model)
    read_drafter(draft, model, 3)


def test_network_of_our_graphs_is_known(step: Constants, draft: Constants, manifest: Manifest) -> None:
    network, _ = read_network(step, manifest.model)
    assert (network.width, network.heads, network.layers, network.farthest) == (64, 2, 2, 255)
    drafter, _ = read_drafter(draft, manifest.model, 3)
    assert (drafter.depths, drafter.width, drafter.head.outputs) == (3, 64, 512)


def test_network_without_any_one_constant_is_not_known(step: Constants, draft: Constants, manifest: Manifest) -> None:
    for graph in (step, draft):
        for name in sorted(graph.keys() - UNREAD):
            taken = graph.pop(name)
            with pytest.raises(NotKnownError):
                read_both(step, draft, manifest.model)
            graph[name] = taken
    read_both(step, draft, manifest.model)


@pytest.mark.parametrize(
    "change",
    [
        lambda array: array[None],
        lambda array: array.reshape(-1)[0],  # no dimension at all
        lambda array: np.concatenate([array, array]),
        lambda array: array.astype(np.float64),
        lambda array: array[:0],
    ],
    ids=["dimension", "scalar", "longer", "type", "empty"],
)
def test_network_with_any_constant_of_another_form_is_not_known(
    step: Constants, draft: Constants, manifest: Manifest, change: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    for graph in (step, draft):
        for name in sorted(graph.keys() - UNREAD):
            taken, graph[name] = graph[name], np.asarray(change(graph[name]))
            with pytest.raises(NotKnownError):
                read_both(step, draft, manifest.model)
            graph[name] = taken


def test_network_with_one_more_constant_is_not_known(step: Constants, draft: Constants, manifest: Manifest) -> None:
    for graph in (step, draft):
        graph["half"] = np.array(0.5, np.float32)
        with pytest.raises(NotKnownError, match="it has half as well"):
            read_both(step, draft, manifest.model)
        del graph["half"]


def test_network_with_weights_around_another_number_is_not_known(step: Constants, manifest: Manifest) -> None:
    zeros = step["blocks.1.up.zero"].copy()
    zeros[-1] = 1
    with pytest.raises(NotKnownError, match="around other numbers than 0"):
        read_network(step | {"blocks.1.up.zero": zeros}, manifest.model)


def test_network_with_distances_from_elsewhere_is_not_known(step: Constants, manifest: Manifest) -> None:
    """Rows of the table are found by it: another one would point outside."""
    for farthest in (254, 256, -1, 2**31 - 1):
        with pytest.raises(NotKnownError, match="distances"):
            read_network(step | {"farthest": np.array([farthest], np.int32)}, manifest.model)


@pytest.mark.parametrize("heads", [1, 3, 4, 64])
def test_network_with_heads_of_another_width_than_two_is_not_known(
    step: Constants, manifest: Manifest, heads: int
) -> None:
    step["relative_bias.columns"] = np.zeros((511, heads), np.float32)
    model = replace(manifest.model, heads=heads)
    if heads == 1:
        read_network(step, model)
    else:
        with pytest.raises(NotKnownError, match="heads are"):
            read_network(step, model)


def test_network_whose_vocabulary_is_no_multiple_of_eight_is_not_known(step: Constants, manifest: Manifest) -> None:
    for name in ("token_embedding.int8", "token_embedding.scale", "head.scale", "head.zero", "head.bias"):
        step[name] = step[name][:508]
    step["head.int8"] = step["head.int8"][:, :508]
    with pytest.raises(NotKnownError, match="508 outputs"):
        read_network(step, replace(manifest.model, vocab_size=508))


@pytest.mark.parametrize("token", [-1, 512, 2**31 - 1])
def test_network_that_drafts_tokens_outside_of_the_vocabulary_is_not_known(
    draft: Constants, manifest: Manifest, token: int
) -> None:
    likely = draft["likely"].copy()
    likely[7] = token
    with pytest.raises(NotKnownError, match="drafts tokens that are none"):
        read_drafter(draft | {"likely": likely}, manifest.model, 3)


def test_network_that_drafts_more_tokens_than_there_are_is_not_known(draft: Constants, manifest: Manifest) -> None:
    """Their scores would not fit into the library's memory; all else fits them."""
    times = manifest.model.vocab_size // draft["likely"].size + 1
    longer = {"likely": np.tile(draft["likely"], times), "head.int8": np.tile(draft["head.int8"], (1, times))}
    longer |= {name: np.tile(draft[name], times) for name in ("head.scale", "head.zero", "head.bias")}
    for depth in range(1, 3):
        name = f"drafter.depths.{depth}.known.int8"
        longer[name] = np.tile(draft[name], (times, 1))
    with pytest.raises(NotKnownError, match="drafts tokens that are none"):
        read_drafter(draft | longer, manifest.model, 3)


def test_network_that_lists_drafted_tokens_otherwise_is_not_known(draft: Constants, manifest: Manifest) -> None:
    for likely in (draft["likely"].astype(np.int64), draft["likely"][:, None], draft["likely"][:504]):
        with pytest.raises(NotKnownError):
            read_drafter(draft | {"likely": likely}, manifest.model, 3)


def test_network_at_any_byte_of_a_file_is_read_from_whole_words(step: Constants, manifest: Manifest) -> None:
    """In a file constants lie anywhere; the library's loads of numbers are aligned to them."""
    for name, array in step.items():
        content = bytes(1) + array.tobytes()
        step[name] = np.frombuffer(content, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    network, alive = read_network(step, manifest.model)
    assert network.token_scales % 4 == network.norm.weight % 4 == 0
    assert all(array.flags.aligned for array in alive if isinstance(array, np.ndarray))


def add_constant(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.5, np.float32), "half"))


@NEEDS_LIBRARY
@pytest.mark.parametrize("role", ["step", "draft"])
def test_network_that_is_not_known_is_served_by_onnx_runtime(
    int8_blocks_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, role: Role
) -> None:
    folder = with_graph(int8_blocks_bundle, tmp_path / "b", role, add_constant)
    with caplog.at_level(logging.INFO, "edge.backends.native_rows"):
        chosen = choose_backend("ort", folder, read_manifest(folder), threads=1)
    assert type(chosen.rows) is OrtRows and chosen.degraded is None
    told = [record.getMessage() for record in caplog.records if record.name == "edge.backends.native_rows"]
    message = f"ONNX Runtime runs the bundle's blocks: the compiled library does not know its {role}"
    assert told == [f"{message}: it has half as well"]


@NEEDS_LIBRARY
def test_network_in_float32_is_served_by_onnx_runtime(blocks_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = read_manifest(blocks_bundle)
    with caplog.at_level(logging.INFO, "edge.backends.native_rows"):
        assert read_networks(blocks_bundle, manifest) is None
    (record,) = caplog.records
    assert record.levelno == logging.INFO and record.getMessage().endswith("does not know its step: it is fp32")
    assert type(choose_backend("ort", blocks_bundle, manifest, threads=1).rows) is OrtRows


@NEEDS_LIBRARY
def test_network_in_int8_is_served_by_the_library(int8_blocks_bundle: Path) -> None:
    manifest = read_manifest(int8_blocks_bundle)
    assert type(choose_backend("ort", int8_blocks_bundle, manifest, threads=1).rows) is NativeRows
