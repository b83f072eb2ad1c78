"""The step graphs compute what the network computes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from host.evaluate.scorers import GraphScorer
from host.export.cpu_graph import cpu_graph
from host.export.cpu_int8 import quantize
from host.export.cuda_graph import cuda_graph
from host.export.cuda_qdq import activation_ranges, quantize_linears
from host.export.graph_builder import NEVER, GraphBuilder
from host.export.random_weights import untrained
from host.model.network import BIAS_FLOOR, CONFIGS, Denoiser, count_parameters, ends_impossible
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD

K = 64


def networks() -> Iterator[tuple[str, Denoiser]]:
    for time_input in (True, False):
        yield f"time input {time_input}", untrained(replace(CONFIGS["debug"], time_input=time_input))[0]


NETWORKS = dict(networks())


def canvases() -> NDArray[np.int32]:
    """All masked; half masked; with an end; infilling with a masked tail.  (4, L)"""
    rng = np.random.default_rng(0)
    rows = rng.integers(FIRST_TEXT_ID, 512, (4, 256)).astype(np.int32)
    rows[0] = MASK
    rows[1, rng.random(256) < 0.5] = MASK
    rows[2, ::3] = MASK
    rows[2, 100], rows[2, 101:] = EOS, PAD
    rows[3, 5:9], rows[3, 20:] = MASK, MASK
    rows[:, 0] = BOS
    return rows


@torch.no_grad()
def reference(model: Denoiser, canvas: NDArray[np.int32], t: float) -> NDArray[np.float32]:
    """Log-probabilities of one canvas, finite.  → (L, V)"""
    row = torch.from_numpy(canvas.astype(np.int64))[None]
    hidden = model.score_canvas(row, torch.tensor([t]) if model.config.time_input else None)[0]
    logp: NDArray[np.float32] = model.logits(hidden, ends_impossible(row)[0]).log_softmax(-1).clamp(min=NEVER).numpy()
    return logp


def session(graph: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("every", [1, 7], ids=["all masked", "some masked"])
def test_cpu_graph_reduces_exactly(name: str, every: int) -> None:
    """ids, log-probabilities over the full vocabulary and entropy of the wanted positions match torch's own."""
    model = NETWORKS[name]
    runtime = session(cpu_graph(model, K))
    for canvas in canvases():
        t, wanted = 0.4, np.flatnonzero(canvas == MASK)[::every]
        feed = {"canvas": canvas[None], "wanted": wanted.astype(np.int32)}
        ids, logp, entropy = runtime.run(
            None, feed | ({"t": np.array([t], np.float32)} if model.config.time_input else {})
        )
        expected = reference(model, canvas, t)[wanted]
        difference = np.abs(np.take_along_axis(expected, ids.astype(np.int64), 1) - logp)
        print(f"logp max {difference.max():.2e} mean {difference.mean():.2e}")
        assert difference.max() < 4e-5  # the two add up in other orders
        np.testing.assert_allclose(entropy, -(np.exp(expected) * expected).sum(1), atol=4e-5)
        np.testing.assert_allclose(logp, np.sort(expected, 1)[:, ::-1][:, :K], atol=4e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_graph_of_a_canvas_cut_after_its_end_is_the_same(name: str) -> None:
    """A shorter canvas has a shorter slice of the relative position bias."""
    model, whole = NETWORKS[name], canvases()[2]
    end = int(np.argmax(whole == EOS))
    wanted = np.flatnonzero(whole[:end] == MASK).astype(np.int32)
    for make, tolerance in ((lambda m: cpu_graph(m, K), 4e-5), (cuda_graph, 4e-3)):
        runtime = session(make(model))
        feed = {"t": np.array([0.4], np.float32), "wanted": wanted}
        feed = {i.name: feed[i.name] for i in runtime.get_inputs() if i.name != "canvas"}
        (kept, *_), (cut, *_) = (
            runtime.run(["logp" if "wanted" in feed else "logits"], feed | {"canvas": row[None]})
            for row in (whole, whole[: end + 1])
        )
        at = slice(None) if "wanted" in feed else (0, wanted)
        np.testing.assert_allclose(kept[at].astype(np.float32), cut[at].astype(np.float32), atol=tolerance, rtol=0)


def test_cpu_graph_puts_the_lower_of_equal_ids_first() -> None:
    """Two words for each place in the vocabulary, half of it apart."""
    model, half = untrained(CONFIGS["debug"])[0], CONFIGS["debug"].vocab_size // 2
    with torch.no_grad():
        for parameter in (model.head.weight, model.head.bias):
            parameter[half + FIRST_TEXT_ID :] = parameter[FIRST_TEXT_ID:half]
    canvas = canvases()[0]
    feed = {"canvas": canvas[None], "t": np.array([0.4], np.float32)}
    wanted = np.flatnonzero(canvas == MASK).astype(np.int32)
    ids, logp, _ = session(cpu_graph(model, K)).run(None, feed | {"wanted": wanted})
    first = (ids[:, :-1] >= FIRST_TEXT_ID) & (ids[:, :-1] < half)  # the last candidate's twin may be cut off
    assert first.sum() > 10 * len(wanted)
    np.testing.assert_array_equal(ids[:, 1:][first], ids[:, :-1][first] + half)
    np.testing.assert_array_equal(logp[:, 1:][first], logp[:, :-1][first])


@pytest.mark.parametrize("name", NETWORKS)
def test_cuda_graph_keeps_batched_rows_apart(name: str) -> None:
    model = NETWORKS[name]
    runtime = session(cuda_graph(model))
    rows = canvases()
    t = np.linspace(0.1, 1, len(rows), dtype=np.float32)
    timed = model.config.time_input
    together = runtime.run(None, {"canvas": rows} | ({"t": t} if timed else {}))[0]
    for i, row in enumerate(rows):
        alone = runtime.run(None, {"canvas": row[None]} | ({"t": t[i : i + 1]} if timed else {}))[0]
        np.testing.assert_allclose(together[i], alone[0], atol=2e-2)


LEVELS = [ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL]
PROOF = pytest.mark.proof("5. ONNX Runtime runs the FP16 and Q/DQ graphs as torch does, optimized or not")


@PROOF
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("level", LEVELS)
def test_cuda_graph_follows_torch_in_half_precision(name: str, level: ort.GraphOptimizationLevel) -> None:
    model = NETWORKS[name]
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    graph = cuda_graph(model)
    assert graph.opset_import[0].version == 20 and graph.ir_version <= 10 and len(graph.opset_import) == 1
    runtime = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for canvas in canvases():
        feed = {"canvas": canvas[None]} | ({"t": np.array([0.4], np.float32)} if model.config.time_input else {})
        logits = runtime.run(None, feed)[0][0].astype(np.float32)
        assert np.isfinite(logits).all()
        certain = np.cumsum(np.isin(canvas, [EOS, PAD])) > 1
        found = torch.from_numpy(logits).log_softmax(-1).clamp(min=NEVER).numpy()
        expected = reference(model, canvas, 0.4)
        likely = (expected > -20) & ~certain[:, None]
        difference = np.abs(found - expected)[likely]
        print(f"FP16 logp max {difference.max():.2e} mean {difference.mean():.2e}")
        assert difference.max() < 0.05 and difference.mean() < 0.005
        assert (found[~certain][:, [MASK, BOS]] < -5000).all()


@pytest.mark.slow
@PROOF
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("level", LEVELS)
def test_cuda_int8_graph_stays_near_torch(name: str, level: ort.GraphOptimizationLevel) -> None:
    """Q/DQ around the linear layers of the FP16 graph. Random weights: more is lost than on a trained network."""
    model = NETWORKS[name]
    half = cuda_graph(model)
    samples = [(canvas, 0.4) for canvas in canvases()]
    graph = quantize_linears(half, activation_ranges(half, samples)["largest"], [])
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    runtime = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    agree, differences = [], []
    for canvas, t in samples:
        feed = {"canvas": canvas[None]} | ({"t": np.array([t], np.float32)} if model.config.time_input else {})
        logits = runtime.run(None, feed)[0][0].astype(np.float32)
        assert np.isfinite(logits).all()
        masked = canvas == MASK
        found = torch.from_numpy(logits).log_softmax(-1).numpy()[masked]
        expected = reference(model, canvas, t)[masked]
        agree.append((found.argmax(1) == expected.argmax(1)).mean())
        differences.append(np.abs(found - expected)[expected > -20].mean())
    print(f"Q/DQ top-1 agreement {np.mean(agree):.1%}, mean log-probability difference {np.mean(differences):.3f}")
    assert np.mean(agree) > 0.85 and np.mean(differences) < 0.1


def test_cpu_int8_graph_stays_near_torch() -> None:
    """7-bit weights by the column: the likeliest token mostly stays, the log-probabilities move a little."""
    model = NETWORKS["time input True"]
    graph = GraphScorer("int8", quantize(cpu_graph(model, K), "dynamic", []))
    agree, difference = [], []
    for canvas in canvases()[:2]:
        found = torch.from_numpy(graph.logits(canvas, 0.4)).log_softmax(-1).numpy()
        expected = reference(model, canvas, 0.4)[canvas == MASK]
        agree.append((found.argmax(1) == expected.argmax(1)).mean())
        difference.append(np.abs(found - expected)[expected > -20].mean())
    print(f"INT8 top-1 agreement {np.mean(agree):.1%}, mean log-probability difference {np.mean(difference):.3f}")
    assert np.mean(agree) > 0.9 and np.mean(difference) < 0.1


def test_graph_refuses_two_constants_under_one_name() -> None:
    graph = GraphBuilder()
    assert graph.constant("scale", np.ones(1, np.float32)) == graph.constant("scale", np.ones(1, np.float32))
    for other in (np.zeros(1, np.float32), np.ones(1, np.float16), np.ones((1, 1), np.float32)):
        with pytest.raises(ValueError, match="two constants under the name scale"):
            graph.constant("scale", other)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_graph_bias_has_a_floor(name: str) -> None:
    """Smaller probabilities are denormal numbers, with which an Intel processor takes half of a step."""
    learned = NETWORKS[name].relative_bias
    assert 10 * learned.min() < BIAS_FLOOR
    half = cuda_graph(NETWORKS[name])
    ranges = activation_ranges(half, [(canvas, 0.4) for canvas in canvases()[:1]])["largest"]
    exact = cpu_graph(NETWORKS[name], K)
    for graph in (exact, quantize(exact, "dynamic", []), half, quantize_linears(half, ranges, [])):
        table = next(numpy_helper.to_array(t) for t in graph.graph.initializer if t.name == "relative_bias")
        assert table.min() == BIAS_FLOOR


def test_graph_gelu_is_the_trained_one() -> None:
    """By erf, as torch computes it."""
    for graph in (cpu_graph(NETWORKS["time input False"], K), cuda_graph(NETWORKS["time input False"])):
        gelus = [node.attribute for node in graph.graph.node if node.op_type == "Gelu"]
        assert len(gelus) == 2 and all(a.s == b"none" for attributes in gelus for a in attributes)


def test_graph_files_hold_their_weights(tmp_path: Path) -> None:
    onnx.save(cuda_graph(NETWORKS["time input False"]), tmp_path / "g.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"]


@pytest.mark.parametrize(("name", "millions"), [("tiny", 7.56), ("small", 17.34), ("medium", 34.27), ("large", 60.71)])
def test_count_parameters_of_each_size(name: str, millions: float) -> None:
    assert CONFIGS[name].vocab_size == 8192 and CONFIGS[name].canvas_len == 256
    assert count_parameters(CONFIGS[name]) / 1e6 == pytest.approx(millions, rel=0.01)
