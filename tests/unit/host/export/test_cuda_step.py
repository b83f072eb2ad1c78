"""The step graph for CUDA computes what the network computes: requests side by side, in any division into passes."""

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
from host.export.cuda_step import LIKELY, cuda_step_graph
from host.export.lint import slow_shapes, violations
from host.export.pipeline import Wanted
from host.export.random_weights import untrained
from host.export.shared_weights import LEAST_BYTES
from host.model.layouts import Gap, causal, evidence
from host.model.network import CONFIGS, NO_PADDING, Denoiser
from shared.manifest import Role, SamplingDefaults, find_graph, graph_bytes, read_manifest
from shared.tokens import BOS, FIRST_TEXT_ID, MASK, PAD
from tests.support.kept_rows import keep

CONFIG = replace(CONFIGS["debug"], draft_depth=3, time_input=False)
MODEL: Denoiser = untrained(CONFIG)[0]
STEP = cuda_step_graph(MODEL)
TOLERANCE = 0.02
"""Of scores whose spread is about 3, in half precision."""


def tokens_of(n: int, seed: int) -> NDArray[np.int32]:
    return np.array([BOS, *np.random.default_rng(seed).integers(FIRST_TEXT_ID, CONFIG.vocab_size, n - 1)], np.int32)


@torch.no_grad()
def expected(rows: tuple[torch.Tensor, ...]) -> NDArray[np.float32]:
    """Scores (N, V) of all rows, by the network."""
    states = MODEL(*rows)[0]
    return MODEL.logits(states, torch.full((len(states),), NO_PADDING)).clamp(min=-1e4).numpy()


def test_cuda_step_graph_keeps_the_rules_of_tensorrt() -> None:
    assert violations(STEP) == [] and slow_shapes(STEP) == []
    assert violations(cuda_step_graph(MODEL, fp32_norms=True)) == []


def test_cuda_step_requests_of_any_length_score_as_the_network_scores_them_alone() -> None:
    """Some rows of each pass are taken back, and the next pass writes over them; idle places cost nothing but time."""
    texts = [tokens_of(n, n) for n in (60, 33, 47)]
    wanted = [expected(causal(torch.from_numpy(text).long()[None])) for text in texts]
    graph, rng, checked = CudaRows(STEP), np.random.default_rng(0), 0
    graph.empty(len(texts))
    while any(graph.cached[r] < text.size for r, text in enumerate(texts)):
        n, kept = int(rng.choice([1, 4, 16])), []
        tokens, positions, sees = (np.zeros((len(texts), n), np.int32) for _ in range(3))
        for r, text in enumerate(texts):
            at = int(graph.cached[r])
            good = min(int(rng.integers(0, n + 1)), text.size - at)
            tokens[r] = rng.integers(FIRST_TEXT_ID, CONFIG.vocab_size, n)  # rejected drafts behind the text
            tokens[r, :good] = text[at : at + good]
            positions[r], sees[r] = at + np.arange(n), np.arange(1, n + 1)
            kept.append(good)
        scored = np.arange(n * len(texts), dtype=np.int32).reshape(len(texts), n)
        made = graph.run(tokens, positions, sees=sees, scored=scored)
        for r, good in enumerate(kept):
            at = int(graph.cached[r])
            np.testing.assert_allclose(made["logits"][r, :good], wanted[r][at : at + good], atol=TOLERANCE, rtol=2e-3)
            checked += good
        keep(graph, made, positions, kept)
    assert checked == sum(text.size for text in texts)


def test_cuda_step_evidence_is_seen_by_all_of_itself_and_by_the_gaps() -> None:
    given, places, gap = tokens_of(9, 5), [0, 1, 2, 3, 4, 9, 10, 11, 12], tokens_of(5, 6)[1:]
    rows = evidence(given.tolist(), places, [Gap(int(given[4]), 5, gap.tolist())])
    wanted, graph = expected(rows)[9:], CudaRows(STEP)
    positions = np.array([places], np.int32)
    nothing = np.zeros((1, 1), np.int32)
    made = graph.run(given[None], positions, sees=np.full((1, 9), 9, np.int32), scored=nothing)
    keep(graph, made, positions, [9])
    for j, token in enumerate([given[4], *gap]):
        places_now = np.array([[4 + j]], np.int32)
        made = graph.run(np.array([[token]], np.int32), places_now, sees=np.ones((1, 1), np.int32), scored=nothing)
        np.testing.assert_allclose(made["logits"][0, 0], wanted[j], atol=TOLERANCE, rtol=2e-3)
        keep(graph, made, places_now, [1])


def test_cuda_step_never_scores_padding_bos_or_mask() -> None:
    text, graph = tokens_of(5, 1)[None], CudaRows(STEP)
    sees = np.arange(1, 6, dtype=np.int32)[None]
    logits = graph.run(text, np.arange(5, dtype=np.int32)[None], sees=sees, scored=sees - 1)["logits"][0]
    assert set(np.flatnonzero((logits < -5e3).all(0)).tolist()) == {PAD, BOS, MASK}, "and EOS may be drawn"


@pytest.mark.parametrize("spoilt", ["sees", "keys.1", "new_values.0"])
def test_lint_names_what_a_step_graph_lacks(spoilt: str) -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(STEP)
    for values in (graph.graph.input, graph.graph.output):
        for value in values:
            if value.name == spoilt:
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    kind = "outputs" if spoilt.startswith("new") else "inputs"
    assert any(f"the {kind} are" in sentence and f"{spoilt} (float)" in sentence for sentence in violations(graph))


def test_cuda_step_in_int8_has_the_drafter_and_nothing_of_attention_in_it() -> None:
    (graph,) = untested_cuda_blocks(MODEL, {"ar": 1.0}, ["int8"], fp32_norms=False)
    assert violations(graph.model) == []
    names = {constant.name for constant in graph.model.graph.initializer}
    assert {LIKELY, "drafter.depths.2.up.weight", "head.weight.int8", "token_embedding.weight"} <= names
    text = tokens_of(24, 2)
    rows = np.arange(24, dtype=np.int32)[None]
    made = CudaRows(graph.model).run(text[None], rows, sees=rows + 1, scored=rows)["logits"][0]
    exact = expected(causal(torch.from_numpy(text).long()[None]))
    assert np.corrcoef(made[:, FIRST_TEXT_ID:].ravel(), exact[:, FIRST_TEXT_ID:].ravel())[0, 1] > 0.98


def test_bundle_holds_what_its_cuda_graphs_share_once(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    export_untrained("debug", folder, wanted=Wanted(cuda_fp16=True), defaults=SamplingDefaults())
    manifest = read_manifest(folder)
    assert [graph.role for graph in manifest.graphs] == ["step", "canvas", "weights"]
    assert manifest.decoders == ("blocks", "canvas") and manifest.blocks is not None and manifest.blocks.window == 3
    constants: dict[Role, dict[str, bytes]] = {}
    roles: tuple[Role, ...] = ("step", "canvas")
    for role in roles:
        graph = find_graph(folder, manifest, "cuda", role)
        whole = onnx.load_from_string(graph_bytes(folder, manifest, graph))
        assert violations(whole) == []
        constants[role] = {c.name: c.raw_data for c in whole.graph.initializer}
        assert len(constants[role]) == len(whole.graph.initializer), "none comes twice"
    for role in roles:
        left = onnx.load(folder / f"{role}.cuda.fp16.onnx").graph.initializer
        shared = {name for name, raw in constants["step"].items() if len(raw) >= LEAST_BYTES}
        assert {c.name for c in left}.isdisjoint(shared)
    assert "drafter.depths.0.down.weight" in constants["step"]
    assert constants["canvas"]["head.weight"] == constants["step"]["head.weight"]
