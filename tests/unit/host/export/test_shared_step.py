"""Rows of several requests in one pass score as in passes of their own, and the bundle holds the constants once."""

from dataclasses import replace
from typing import cast

import pytest
from onnx import TensorProto

from host.export import shared_step
from host.export.blocks_pipeline import untested_blocks
from host.export.bundle_writer import BundleGraph
from host.export.random_weights import untrained
from host.export.row_builder import Ranges
from host.export.shared_weights import LEAST_BYTES
from host.export.step_graph import draft_graph, step_graph
from host.model.network import CONFIGS
from shared.errors import BundleError

MODEL = untrained(replace(CONFIGS["debug"], time_input=False, draft_depth=2))[0]
GRAPHS = {graph.role: graph for graph in untested_blocks(MODEL, ["ar"], int8=True)}
STEP, DRAFT = GRAPHS["step"], GRAPHS["draft"]


def test_shared_step_scores_rows_as_alone_to_the_bit() -> None:
    assert shared_step.rows_that_differ(STEP.model, shared_step.shared_step(STEP.model, DRAFT.model)) == 0


def test_shared_step_would_not_with_scales_of_each_pass() -> None:
    """What the gate of the export would find."""
    dynamic = BundleGraph(step_graph(MODEL, cast(Ranges, "dynamic")), "step", "int8", "cpu")
    with pytest.raises(BundleError, match="rows score otherwise"):
        shared_step.with_shared_step([dynamic, DRAFT])


def test_shared_step_leaves_large_constants_in_the_files_of_the_others() -> None:
    shared = GRAPHS["step.shared"].model
    files = {graph.file: graph.model.SerializeToString() for graph in (STEP, DRAFT)}
    whole = {c.name: c for c in shared_step.shared_step(STEP.model, DRAFT.model).graph.initializer}
    elsewhere = [c for c in shared.graph.initializer if c.data_location == TensorProto.EXTERNAL]
    assert elsewhere and all(len(c.raw_data) < LEAST_BYTES for c in shared.graph.initializer)
    for constant in elsewhere:
        where = {entry.key: entry.value for entry in constant.external_data}
        start, length = int(where["offset"]), int(where["length"])
        assert files[where["location"]][start : start + length] == whole[constant.name].raw_data


def test_shared_step_is_made_of_int8_alone() -> None:
    step = BundleGraph(step_graph(MODEL), "step", "fp32", "cpu")
    floats = [step, BundleGraph(draft_graph(MODEL), "draft", "fp32", "cpu")]
    assert shared_step.with_shared_step(floats) == floats
    assert shared_step.with_shared_step([STEP]) == [STEP]
