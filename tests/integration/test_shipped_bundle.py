"""The bundle in the repository: complete, small, honest about itself, and able to tell a story."""

import re
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file

from edge.config import default_bundle
from edge.serving.loaded_bundle import LoadedBundle
from edge.serving.scheduler import Scheduler
from host.evaluate.scorers import GraphScorer, load_graph
from host.export.law_parity import passes_law
from host.export.parity import passes
from host.model.network import BIAS_FLOOR
from shared.manifest import (
    TOKENIZER,
    SamplingDefaults,
    bundle_digest,
    find_graph,
    graph_bytes,
    read_manifest,
    verified_bytes,
)
from shared.messages import OPEN_POSITION, Gap, GenerateRequest, Reply, Response
from shared.tokens import BOS, EOS, MASK, PAD

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def loaded() -> LoadedBundle:
    return LoadedBundle.load(default_bundle(), threads=2)


def test_shipped_bundle_is_complete_and_small() -> None:
    folder = default_bundle()
    manifest = read_manifest(folder)
    assert {(g.role, g.target, g.precision) for g in manifest.graphs} == {
        ("step", "cpu", "int8"),
        ("prefill", "cpu", "int8"),
        ("draft", "cpu", "int8"),
        ("canvas", "cpu", "int8"),
        *((role, "cuda", precision) for role in ("step", "canvas", "weights") for precision in ("fp16", "int8")),
    }
    assert manifest.decoders == ("blocks", "canvas")
    for graph in manifest.graphs:
        verified_bytes(folder, graph.file, graph.sha256)
    verified_bytes(folder, TOKENIZER, manifest.tokenizer_sha256)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 45e6


def test_shipped_bundle_is_what_the_readme_says() -> None:
    manifest = read_manifest(default_bundle())
    readme = (ROOT / "README.md").read_text("utf-8")
    (law,) = [law for law in manifest.laws if law.graph == find_graph(default_bundle(), manifest, "cpu", "step").file]
    (canvas,) = [one for one in manifest.evaluations if one.graph.startswith("canvas.cpu")]
    bits, bound = law.left_to_right_bits_per_byte, canvas.bits_per_byte
    for figure in (
        f"{manifest.name}@{bundle_digest(default_bundle())[:12]}",
        f"{manifest.model.parameters / 1e6:.1f} M parameters",
        f"{manifest.data.tokens_seen / 1e6:.1f} M tokens",
        f"{bits.value:.3f} ± {bits.stderr:.3f} bits per byte",
        f"{bound.value:.3f} ± {bound.stderr:.3f} bits per byte",
    ):
        assert figure in readme, figure
    conditions = read_manifest(ROOT / "bundle" / "tinystories-conditions").conditions
    assert conditions is not None
    kinds = ["words", "pictures, trained styles", "pictures, openmoji (held out)"]
    assert [one.given for one in conditions.asked_for] == kinds
    told = ", ".join(f"{100 * one.told.value:.0f} ± {100 * one.told.stderr:.0f} %" for one in conditions.asked_for)
    base = ", ".join(f"{100 * one.base.value:.0f}" for one in conditions.asked_for)
    assert f"{told} (unasked {base} %)" in readme
    published = ROOT / "bundle" / "tinystories-hf"
    seconds = msgspec.json.decode((published / "config.json").read_bytes())["training"]["compute_seconds"]
    weights = load_file(published / "model.safetensors")
    drafter = sum(weight.size for name, weight in weights.items() if name.startswith("drafter."))
    assert f"{drafter / 1e6:.1f} M of them the drafter" in readme and f"{seconds / 3600:.0f} CPU-hours" in readme
    assert len(set(re.findall(rf"{manifest.name}@[0-9a-f]{{12}}", readme))) == 1


def test_shipped_bundle_readme_shows_the_first_three_texts_of_quality() -> None:
    page = (ROOT / "docs" / "quality.md").read_text("utf-8").partition("### Twenty texts")[2]
    shown = re.findall(r"^- (Once upon .*) …$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert [f"\n{seed}. {text}" in page for seed, text in enumerate(shown)] == [True] * 3


def test_shipped_bundle_passed_the_gate_and_quality_states_its_figures() -> None:
    manifest = read_manifest(default_bundle())
    assert manifest.parity and all(passes(parity) for parity in manifest.parity)
    page = (ROOT / "docs" / "quality.md").read_text("utf-8").partition("## Records")[0]
    assert {e.graph for e in manifest.evaluations} == {"torch fp32", find_graph(default_bundle(), manifest, "cpu").file}
    step = find_graph(default_bundle(), manifest, "cpu", "step").file
    assert {law.graph for law in manifest.laws} == {"torch fp32", step}
    for law in manifest.laws:
        if (kept := law.tokens_per_pass) is not None:
            assert "found {:.2f}, {:.2f} and {:.2f}".format(*(kept[heat] for heat in ("0", "0.8", "1"))) in page
        for figure in (
            law.left_to_right_nats_per_token,
            law.left_to_right_bits_per_byte,
            law.infilling_nats_per_gap_token,
        ):
            assert figure is not None and f"{figure.value:.3f} ± {figure.stderr:.3f}" in page
    assert [gate.graph for gate in manifest.law_parity] == [g.file for g in manifest.graphs if g.role == "step"]
    for gate in manifest.law_parity:
        assert passes_law(gate)
        assert f"× {gate.law_ratio:.4f}" in page and f"× {gate.infilling_ratio:.4f}" in page
    for parity in manifest.parity:
        assert f"× {parity.nelbo_ratio:.4f}" in page and f"{parity.top1_agreement:.1%}".replace("%", " %") in page
    for evaluation in manifest.evaluations:
        for figure in (evaluation.nelbo_nats_per_token, evaluation.bits_per_byte, evaluation.masked_cross_entropy):
            assert f"{figure.value:.3f} ± {figure.stderr:.3f}" in page


def test_shipped_bundle_has_no_denormals_and_the_trained_gelu() -> None:
    """Its graphs are those that `host.export` makes of the same weights today."""
    canvases = [g for g in read_manifest(default_bundle()).graphs if g.role == "canvas"]
    for graph in (load_graph(default_bundle() / g.file) for g in canvases):
        (table,) = [numpy_helper.to_array(t) for t in graph.graph.initializer if t.name == "relative_bias"]
        assert table.min() == BIAS_FLOOR
        gelus = [node.attribute for node in graph.graph.node if node.op_type == "Gelu"]
        assert len(gelus) == 4 and all(a.s == b"none" for attributes in gelus for a in attributes)


def test_shipped_bundle_defaults_are_those_of_every_new_bundle() -> None:
    assert read_manifest(default_bundle()).defaults == SamplingDefaults()


@pytest.mark.parametrize("how", [{}, {"decode": "canvas", "max_tokens": 120}], ids=["blocks", "canvas"])
def test_shipped_bundle_tells_a_story_that_ends(loaded: LoadedBundle, how: dict[str, Any]) -> None:
    completion = loaded.run(loaded.prepare(GenerateRequest(prompt="Once upon a time", seed=1, **how)))
    assert completion.text.startswith("Once upon a time") and OPEN_POSITION not in completion.text
    assert EOS in completion.canvas and completion.generated_tokens > 20
    words = completion.text.lower().split()
    assert len(set(words)) > 20, "a story repeats some words, not all"


def test_shipped_bundle_fills_gaps_and_leaves_the_given_text_alone(loaded: LoadedBundle) -> None:
    request = GenerateRequest(segments=["Tom had a ", Gap(4), " and it was ", Gap(3), "."], seed=3)
    text = loaded.run(loaded.prepare(request)).text
    assert text.startswith("Tom had a ") and " and it was " in text and text.endswith(".")
    assert len(text) > len("Tom had a  and it was .")


def test_shipped_text_does_not_depend_on_the_drafts(loaded: LoadedBundle) -> None:
    """1,000 prompts: `python -m pytest -m slow tests/unit/host/export/test_rows_apart.py` does it row by row."""
    for seed, temperature in enumerate([0.0, 0.8, 0.8, 1.0, 1.0, 0.7]):
        texts = {
            loaded.run(loaded.prepare(GenerateRequest(prompt="Tom", seed=seed, temperature=temperature, window=w))).text
            for w in (0, 1, 3)
        }
        assert len(texts) == 1


def test_shipped_text_does_not_show_what_was_computed_beside_it(loaded: LoadedBundle) -> None:
    """INT8 scales its activations by what a run holds: neighbours in one run would change them."""
    assert loaded.lanes == 2
    asked: list[dict[str, Any]] = [
        {"prompt": "Once upon a time"},
        {"prompt": "Once upon a time", "steps": 6},
        {"prompt": "Tom and the dog", "steps": 5},
        {"prompt": "Lily found a", "steps": 4, "max_tokens": 40},
        {"prompt": "One day, a bird", "steps": 6, "max_tokens": 30},
        {"prompt": "The dog", "steps": 5, "max_tokens": 90, "temperature": 1.2},
        {"segments": ["Tom had a ", Gap(4), " and it was ", Gap(3), "."], "steps": 3},
    ]
    requests = [GenerateRequest(seed=seed, **fields) for seed, fields in enumerate(asked)]
    alone = [loaded.run(loaded.prepare(request)).text for request in requests]
    scheduler = Scheduler(loaded, queue_size=16)
    together: list[Reply] = []
    for request in requests:
        scheduler.submit(request, together.append)
    scheduler.start()
    scheduler.refuse_new()
    while scheduler.busy:
        time.sleep(0.01)
    scheduler.stop()
    texts = {reply.seed: reply.text for reply in together if isinstance(reply, Response)}
    assert [texts[seed] for seed in range(len(alone))] == alone


def test_shipped_bundle_graphs_agree(loaded: LoadedBundle) -> None:
    """INT8 for the CPU and FP16 for CUDA, both run here by ONNX Runtime, mostly prefer the same tokens."""
    folder = default_bundle()
    cpu, cuda = (
        GraphScorer(graph.file, onnx.load_from_string(graph_bytes(folder, loaded.manifest, graph)))
        for graph in (find_graph(folder, loaded.manifest, target) for target in ("cpu", "cuda"))
    )
    canvas = loaded.run(loaded.prepare(GenerateRequest(prompt="Once upon a time", decode="canvas", seed=2))).canvas
    text = np.flatnonzero(~np.isin(canvas, [PAD, BOS, EOS]))
    canvas = canvas.copy()
    canvas[text[5::2]] = MASK
    masked = canvas == MASK
    best = [scorer.logits(canvas, 0.5).argmax(-1) for scorer in (cpu, cuda)]
    agreement = float((best[0] == best[1]).mean())
    print(f"top-1 agreement of INT8 and FP16 over {masked.sum()} positions: {agreement:.1%}")
    assert agreement > 0.8
