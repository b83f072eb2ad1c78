"""Conditioned step graphs and memories: what is not exactly as `host.export` makes it is left to ONNX Runtime."""

from collections.abc import Callable
from ctypes import addressof
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.native import Network
from edge.native.initializers import initializers
from edge.native.network import NotKnownError, read_conditioned, read_network
from edge.native.readings import HIDDEN, Readings
from host.export.__main__ import export_untrained
from host.export.pipeline import Wanted
from shared.manifest import SamplingDefaults, read_manifest

Constants = dict[str, NDArray[Any]]
BEST = {"step.conditioned": None, "step.guided": 64}
ROLES = pytest.mark.parametrize("role", BEST)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Constants]:
    folder = tmp_path_factory.mktemp("bundles") / "b"
    export_untrained("debug", folder, wanted=Wanted(cpu_int8=True), defaults=SamplingDefaults(), conditions=True)
    assert read_manifest(folder).top_k == BEST["step.guided"]
    return {role: initializers((folder / f"{role}.cpu.int8.onnx").read_bytes()) for role in ("step", *BEST)}


@pytest.fixture(scope="module")
def network(graphs: dict[str, Constants], int8_blocks_bundle: Path) -> tuple[Network, list[Any]]:
    return read_network(graphs["step"], read_manifest(int8_blocks_bundle).model)


def read(graphs: dict[str, Constants], network: Network, role: str, **changed: Any) -> Network:
    constants = {name: array for name, array in (graphs[role] | changed).items() if array is not None}
    made, alive = read_conditioned(constants, graphs["step"], network, best=BEST[role])
    assert alive
    return made


@ROLES
def test_readings_of_our_graphs_are_known(
    graphs: dict[str, Constants], network: tuple[Network, list[Any]], role: str
) -> None:
    """They share the weights, and have their own scales of what these multiply; the plain network keeps its own."""
    plain, own = network[0], graphs[role]
    before = plain.blocks[1].up.input_scale
    own = own | {"blocks.1.up.in.scale": own["blocks.1.up.in.scale"] * 2}
    made = read(graphs, plain, role, **own)
    assert made.blocks[1].up.input_scale == own["blocks.1.up.in.scale"][0] != plain.blocks[1].up.input_scale == before
    assert made.head.weights == plain.head.weights and made.blocks[1].up.weights == plain.blocks[1].up.weights
    assert addressof(made.blocks[0]) != addressof(plain.blocks[0])


@ROLES
def test_readings_of_a_graph_with_any_other_constant_are_not_known(
    graphs: dict[str, Constants], network: tuple[Network, list[Any]], role: str
) -> None:
    for name, array in graphs[role].items():
        scale = name.endswith((".in.scale", ".in.zero"))
        others = [None, array[None], array.astype(np.float64), *([] if scale else [array + 1])]
        for other in others if name in graphs["step"] else (None, array + 1):
            if other is not None and other.dtype == np.float64 and not scale:
                continue  # the same numbers
            with pytest.raises(NotKnownError):
                read(graphs, network[0], role, **{name: other})
    with pytest.raises(NotKnownError, match=r"half is \[0.5\]"):
        read(graphs, network[0], role, half=np.array([0.5]))


def test_readings_of_the_other_kind_of_graph_are_not_known(
    graphs: dict[str, Constants], network: tuple[Network, list[Any]]
) -> None:
    for role, best in (("step.conditioned", 64), ("step.guided", None), ("step.guided", 63)):
        with pytest.raises(NotKnownError):
            read_conditioned(graphs[role], graphs["step"], network[0], best=best)


def memory_of(rows: int) -> Constants:
    """Of two layers with two heads, of 64 numbers."""
    made: Constants = {}
    for layer in range(2):
        made[f"memory_keys.{layer}"] = np.ones((64, 2 * rows), np.int8)
        made[f"memory_key_scales.{layer}"] = np.ones(2 * rows, np.float32)
        made[f"memory_bias.{layer}"] = np.arange(2 * rows, dtype=np.float32)
        made[f"memory_values.{layer}"] = np.ones((2 * rows, 64), np.int8)
        made[f"memory_value_scales.{layer}"] = np.ones(64, np.float32)
    return made


def readings(memory: Constants) -> Readings:
    return Readings(memory, layers=2, heads=2, width=64)


def test_readings_take_over_what_is_hidden() -> None:
    memory = memory_of(3)
    made = readings(memory)
    assert made.most == 8 and made._biases[1].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    memory["memory_bias.1"][[1, 4]] = -np.inf
    made.hide()
    assert made._biases[1].tolist() == [0, HIDDEN, 2, 3, HIDDEN, 5, 0, 0]
    assert made._biases[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]


CHANGES: list[Callable[[NDArray[Any]], NDArray[Any] | None]] = [
    lambda array: None,
    lambda array: array[None],
    lambda array: array[:-1],
    lambda array: array[..., :-2],
    lambda array: array.astype(np.float64),
    lambda array: np.concatenate([array, array]),
]


@pytest.mark.parametrize("change", CHANGES, ids=["absent", "dimension", "shorter", "narrower", "type", "longer"])
def test_readings_of_a_memory_of_another_form_are_not_known(
    change: Callable[[NDArray[Any]], NDArray[Any] | None],
) -> None:
    """The library would read outside of it."""
    for name, array in memory_of(3).items():
        other = change(array)
        memory = memory_of(3) | ({} if other is None else {name: other})
        if other is None:
            del memory[name]
        with pytest.raises(NotKnownError):
            readings(memory)


def test_readings_of_a_memory_without_rows_are_not_known() -> None:
    with pytest.raises(NotKnownError, match="without rows"):
        readings(memory_of(0))
