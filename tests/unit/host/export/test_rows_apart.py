"""No activation scale of an INT8 graph spans rows: neither the pass's other rows nor their number change a token."""

from dataclasses import replace
from typing import cast

import numpy as np
import pytest

from edge.config import default_bundle
from host.evaluate.row_graphs import RowGraphs
from host.evaluate.scorers import load_graph
from host.export.blocks_pipeline import untested_blocks
from host.export.random_weights import untrained
from host.export.row_builder import Ranges
from host.export.step_graph import step_graph
from host.model.network import CONFIGS
from shared.manifest import find_graph, has_role, read_manifest
from shared.tokens import BOS
from tests.support.rows_apart import tokens_that_differ

PASSES = (16, 64)
CONFIG = replace(CONFIGS["debug"], time_input=False)
MODEL = untrained(CONFIG)[0]


def test_rows_draw_the_same_tokens_alone_and_among_others() -> None:
    (step,) = untested_blocks(MODEL, ["ar"], int8=True)
    assert tokens_that_differ(RowGraphs(step.model), CONFIG.vocab_size, range(40), PASSES) == 0


def test_rows_alone_score_the_same_to_the_bit() -> None:
    """A pass of one row would sum attention in another order; `RowGraphs` gives it twice, as every reader has to."""
    wide = replace(CONFIGS["tiny"], vocab_size=512, time_input=False)  # a small one rounds nothing otherwise
    (step,) = untested_blocks(untrained(wide)[0], ["ar"], int8=True)
    graphs, rng, n = RowGraphs(step.model), np.random.default_rng(0), 160
    text = [BOS, *rng.integers(4, wide.vocab_size, n - 1).tolist()]
    together, _ = graphs.append(graphs.empty(n), text, range(n), range(n))
    cache = graphs.empty(n)
    alone = [graphs.append(cache, [token], [i], [0])[0][0] for i, token in enumerate(text)]
    assert np.array_equal(np.stack(alone), together)


def test_rows_would_not_with_scales_of_each_pass() -> None:
    """What the test above would find."""
    dynamic = RowGraphs(step_graph(MODEL, cast(Ranges, "dynamic")))
    assert tokens_that_differ(dynamic, CONFIG.vocab_size, range(4), PASSES) > 0


def test_rows_that_are_rejected_do_not_change_the_scores_before_them() -> None:
    (step,) = untested_blocks(MODEL, ["ar"], int8=True)
    graphs, rng = RowGraphs(step.model), np.random.default_rng(0)
    text = [BOS, *rng.integers(4, CONFIG.vocab_size, 9).tolist()]
    found = []
    for _ in range(3):
        drafts = rng.integers(4, CONFIG.vocab_size, 6).tolist()
        found.append(graphs.append(graphs.empty(16), text + drafts, range(16), [9])[0])
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@pytest.mark.slow
def test_rows_of_the_shipped_bundle_draw_the_same_tokens_on_1000_prompts() -> None:
    manifest = read_manifest(default_bundle())
    if not has_role(manifest, "cpu", "step"):
        pytest.skip("the shipped bundle has no step graph")
    file = find_graph(default_bundle(), manifest, "cpu", role="step").file
    graphs = RowGraphs(load_graph(default_bundle() / file))
    assert tokens_that_differ(graphs, manifest.model.vocab_size, range(1000), PASSES) == 0
