"""The graphs for CUDA that take conditions compute what the network computes, and without a condition what they would
without a memory, to the bit.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from host.evaluate.cuda_rows import CudaRows
from host.export.__main__ import export_untrained
from host.export.blocks_pipeline import untested_cuda_blocks
from host.export.cuda_memory import MEMORY_ROWS, cuda_encode_image_graph, cuda_encode_text_graph
from host.export.cuda_step import cuda_step_graph
from host.export.lint import slow_shapes, violations
from host.export.pipeline import Wanted
from host.export.random_weights import random_conditions, untrained
from host.model.conditions import Condition, Given
from host.model.layouts import causal
from host.model.network import CONFIGS, NO_PADDING, Denoiser
from shared.manifest import SamplingDefaults, find_graph, graph_bytes, read_manifest
from shared.tokens import BOS, FIRST_TEXT_ID
from tests.support.kept_rows import keep

CONFIG = replace(CONFIGS["debug"], draft_depth=3, time_input=False, conditions=True)
MODEL: Denoiser = untrained(CONFIG)[0]
STEP = cuda_step_graph(MODEL)
ENCODERS = {"encode.text": cuda_encode_text_graph(MODEL), "encode.image": cuda_encode_image_graph(MODEL)}
TOLERANCE = 0.03
"""Of scores whose spread is about 3, in half precision."""
WORDS, PICTURES = random_conditions(CONFIG.vocab_size, 6, seed=1)[-2:]
ONE, TWO = (replace(PICTURES, pictures=PICTURES.pictures[:count]) for count in (1, 2))
CONDITIONS = [
    WORDS,
    PICTURES,
    replace(PICTURES, words=WORDS.words),
    Condition([[FIRST_TEXT_ID]]),
    ONE,
    TWO,
    replace(ONE, words=WORDS.words[1:2]),
    replace(TWO, words=WORDS.words[:2]),
]
N = 24


def tokens_of(n: int, seed: int) -> NDArray[np.int32]:
    return np.array([BOS, *np.random.default_rng(seed).integers(FIRST_TEXT_ID, CONFIG.vocab_size, n - 1)], np.int32)


@torch.no_grad()
def expected(text: NDArray[np.int32], condition: Condition | None) -> NDArray[np.float32]:
    """Scores (N, V) of all rows, by the network."""
    memory = None if condition is None else MODEL.remember(Given.of([condition]))
    states = MODEL(*causal(torch.from_numpy(text).long()[None]), memory=memory)[0]
    return MODEL.logits(states, torch.full((len(states),), NO_PADDING)).clamp(min=-1e4).numpy()


def in_passes(graph: CudaRows, texts: NDArray[np.int32], size: int) -> NDArray[np.float16]:
    """Scores (R, N, V) of texts (R, N) side by side, in passes of `size` rows."""
    made, count = [], len(texts)
    for start in range(0, N, size):
        places = np.tile(np.arange(start, start + size, dtype=np.int32), (count, 1))
        sees = np.tile(np.arange(1, size + 1, dtype=np.int32), (count, 1))
        scored = np.arange(count * size, dtype=np.int32).reshape(count, size)
        made.append(graph.run(texts[:, start : start + size], places, sees=sees, scored=scored))
        keep(graph, made[-1], places, [size] * count)
    return np.concatenate([one["logits"] for one in made], 1)


def in_float32(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in float32: what ONNX Runtime leaves unrounded between two nodes depends on the nodes beside."""
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    wide = onnx.ModelProto()
    wide.CopyFrom(graph)
    for constant in (c for c in wide.graph.initializer if c.data_type == half):
        values = onnx.numpy_helper.to_array(constant).astype(np.float32)
        constant.CopyFrom(onnx.numpy_helper.from_array(values, constant.name))
    for value in (*wide.graph.input, *wide.graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = full
    return wide


@pytest.mark.parametrize("fp32_norms", [False, True])
def test_cuda_conditions_keep_the_rules_of_tensorrt(fp32_norms: bool) -> None:
    for make in (cuda_step_graph, cuda_encode_text_graph, cuda_encode_image_graph):
        assert violations(make(MODEL, fp32_norms)) == [] and slow_shapes(make(MODEL, fp32_norms)) == []


def test_cuda_conditions_of_several_requests_are_read_side_by_side_as_the_network_reads_them() -> None:
    graph, given = CudaRows(STEP, ENCODERS), [*CONDITIONS, None]
    texts = np.stack([tokens_of(N, seed) for seed in range(len(given))])
    graph.empty(len(given))
    for r, condition in enumerate(given):
        if condition is not None:
            graph.remember(condition, r)
    made = in_passes(graph, texts, 4)
    for text, condition, scores in zip(texts, given, made, strict=True):
        np.testing.assert_allclose(scores, expected(text, condition), atol=TOLERANCE, rtol=4e-3)
        assert np.abs(expected(text, condition) - expected(text, None)).max() > 10 * TOLERANCE or condition is None


def test_cuda_conditions_absent_leave_the_plain_law_as_it_is_to_the_bit() -> None:
    """Also beside a request that has one, and behind another condition in the same memory."""
    plain_model = untrained(replace(CONFIG, conditions=False))[0]
    plain_model.load_state_dict(MODEL.state_dict(), strict=False)
    graphs = [CudaRows(in_float32(cuda_step_graph(plain_model))), CudaRows(in_float32(STEP))]
    texts, halves = np.stack([tokens_of(N, seed) for seed in range(2)]), CudaRows(STEP, ENCODERS)
    halves.empty(2)
    for r in range(2):
        halves.remember(CONDITIONS[2], r)
    halves.given["reads"][1] = np.arange(MEMORY_ROWS) == MEMORY_ROWS - 1
    for size in (1, 4):
        for graph in graphs:
            graph.empty(2)
            graph.memory = {name: array.astype(np.float32) for name, array in graph.memory.items()}
        for name, array in halves.given.items():
            graphs[1].given[name] = array if name == "reads" else array.astype(np.float32)  # type: ignore[assignment]
        wanted, made = (in_passes(graph, texts, size) for graph in graphs)
        np.testing.assert_array_equal(made[1], wanted[1])
        assert not np.array_equal(made[0], wanted[0])


def test_cuda_conditions_in_int8_are_near_the_network() -> None:
    graphs = {str(g.role): g.model for g in untested_cuda_blocks(MODEL, {"ar"}, ["int8"], fp32_norms=False)}
    assert all(violations(graph) == [] for graph in graphs.values())
    assert all(any(n.op_type == "QuantizeLinear" for n in graph.graph.node) for graph in graphs.values())
    graph = CudaRows(graphs.pop("step"), graphs)
    graph.remember(CONDITIONS[2])
    text = tokens_of(N, 2)
    made, exact = in_passes(graph, text[None], N)[0], expected(text, CONDITIONS[2])
    assert np.corrcoef(made[:, FIRST_TEXT_ID:].ravel(), exact[:, FIRST_TEXT_ID:].ravel())[0, 1] > 0.98


@pytest.mark.parametrize("spoilt", ["reads", "memory_keys.1", "pixels", "memory_values.0"])
def test_lint_names_what_a_graph_of_conditions_lacks(spoilt: str) -> None:
    found = []
    for graph in (STEP, *ENCODERS.values()):
        copy = onnx.ModelProto()
        copy.CopyFrom(graph)
        for value in (*copy.graph.input, *copy.graph.output):
            if value.name == spoilt:
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        found += violations(copy)
    assert any(f"{spoilt} (float)" in sentence for sentence in found)


def test_bundle_for_cuda_alone_takes_conditions_and_holds_its_tables_once(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    wanted = Wanted(cuda_fp16=True)
    export_untrained("debug", folder, wanted=wanted, defaults=SamplingDefaults(), conditions=True)
    manifest = read_manifest(folder)
    assert manifest.conditions is not None
    roles = ["step", "encode.text", "encode.image"]
    assert [graph.role for graph in manifest.graphs] == [*roles, "canvas", "weights"]
    for role in ("step", "encode.text", "encode.image", "canvas"):
        graph = find_graph(folder, manifest, "cuda", role)
        whole = onnx.load_from_string(graph_bytes(folder, manifest, graph))
        onnx.checker.check_model(whole)
        left = {c.name for c in onnx.load(folder / graph.file).graph.initializer}
        assert left.isdisjoint({"token_embedding.weight", "head.weight", "conditions.reads.0.kv.weight"})
