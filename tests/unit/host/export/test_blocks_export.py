"""What `host.export` makes of a run's laws: the graphs of blocks, in INT8 only within the gate."""

from pathlib import Path

import numpy as np
import pytest
import torch

from host.evaluate.laws import law_figures
from host.evaluate.likelihood import held_out_split
from host.export import __main__ as export
from host.export.blocks_pipeline import blocks_graphs, blocks_int8, law_reference
from host.export.law_parity import agreeing, passes_law, read, row_graphs
from host.export.random_weights import untrained
from host.export.row_builder import LEVELS_U8, activation_scale
from host.export.row_ranges import Observed, best_ranges, rounding_errors
from host.model.network import CONFIGS, Denoiser
from host.train import trainer as train
from host.train.run_folder import data_of, load_run
from shared.errors import BundleError
from shared.manifest import BlocksDefaults, LawParity, TrainingStage, read_manifest
from tests.support.commands import call, small


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A network of three objectives, and its drafter's run."""
    folder = tmp_path_factory.mktemp("laws")
    a, b = folder / "body", folder / "chain"
    call(train.main, *small(data, a, "--objectives", "ar=2,infill,canvas", "--steps", 20, "--valid-every", 20))
    drafter = ["--data", data, "--out", b, "--batch-size", 8, "--stage", "drafter", "--init", a]
    call(train.main, *drafter, "--steps", 10, "--valid-every", 10)
    return a, b


@pytest.mark.slow
def test_export_of_blocks_passes_its_gate_and_says_what_it_measured(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = runs
    call(export.main, "--run", b, "--out", tmp_path / "both", "--int8", "--target", "cpu", "--stories", 24)
    printed, manifest = capsys.readouterr().out, read_manifest(tmp_path / "both")
    assert [graph.role for graph in manifest.graphs] == ["step", "prefill", "draft", "canvas"]
    assert {graph.precision for graph in manifest.graphs} == {"int8"}
    assert manifest.decoders == ("blocks", "canvas") and manifest.blocks == BlocksDefaults(window=3)
    (parity,) = manifest.law_parity
    assert passes_law(parity) and parity.infilling_ratio is not None and 0 <= parity.texts_agreeing <= 1
    assert parity.graph == "step.cpu.int8.onnx" and "of greedy texts the same: passes the gate" in printed
    assert printed.count("median ms of a pass behind 128 cached rows: 1 row ") == 2
    model, progress = load_run(b)
    exact, graph = manifest.laws
    assert exact == law_figures(model, held_out_split(data_of(b), 24), progress.objectives)
    assert exact.tokens_per_pass is not None and list(exact.tokens_per_pass) == ["0", "0.8", "1"]
    assert graph.graph == parity.graph and graph.infilling_nats_per_gap_token is not None
    exact_nats, nats = (one.left_to_right_nats_per_token.value for one in (exact, graph))
    assert nats == pytest.approx(exact_nats, rel=0.005) and nats != exact_nats
    assert "step.cpu.int8.onnx: 64 stories of training" in manifest.calibration
    first, second = manifest.data.stages
    assert first == TrainingStage(name=a.name, objectives=("ar", "infill", "canvas"), tokens=first.tokens)
    assert second.objectives == ("drafter",) and manifest.data.tokens_seen == first.tokens + second.tokens


def test_export_of_a_run_that_learned_ar_alone_makes_blocks_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "ar", tmp_path / "bundle"
    call(train.main, *small(data, run, "--objectives", "ar", "--steps", 2))
    call(export.main, "--run", run, "--out", out, "--stories", 4)
    manifest = read_manifest(out)
    assert [graph.file for graph in manifest.graphs] == ["step.cpu.fp32.onnx"]
    assert manifest.decoders == ("blocks",) and manifest.blocks == BlocksDefaults(window=0)
    assert manifest.evaluations == () and manifest.law_parity == () and manifest.calibration == "none"
    assert [law.graph for law in manifest.laws] == ["torch fp32", "step.cpu.fp32.onnx"]
    assert all(law.infilling_nats_per_gap_token is None for law in manifest.laws)
    call(export.main, "--run", run, "--out", out, "--stories", 4, "--fp16", "--target", "cuda")
    manifest = read_manifest(out)
    assert [graph.file for graph in manifest.graphs] == ["step.cuda.fp16.onnx", "weights.cuda.fp16.onnx"]
    (parity,) = manifest.law_parity
    assert passes_law(parity)


@pytest.mark.slow
@pytest.mark.parametrize("ruined", [1, 2], ids=["one layer", "most"])
def test_blocks_leave_layers_in_float_that_int8_ruins(runs: tuple[Path, Path], ruined: int) -> None:
    """One channel of normalised vectors 10,000 times larger, and its weights as much smaller: the same in float32."""
    model, progress = load_run(runs[0])
    for i in range(ruined):
        with_outlier(model, f"blocks.{i}.norm2", f"blocks.{i}.up")
    if ruined == 2:
        for norm, layer in (("blocks.0.norm1", "blocks.0.qkv"), ("blocks.1.norm1", "blocks.1.qkv"), ("norm", "head")):
            with_outlier(model, norm, layer)
    folder = data_of(runs[0])
    held_out, text = held_out_split(folder, 16), folder.train.take(np.arange(16))
    learned = progress.objectives
    reference = law_reference(model, learned, held_out, text)
    if ruined == 1:
        (parity,) = blocks_int8(reference).parity
        assert parity.kept_float == ("blocks.0.up",) and passes_law(parity)
    else:
        with pytest.raises(BundleError, match="INT8 for blocks misses its gate"):
            blocks_int8(reference)


@torch.no_grad()
def with_outlier(model: Denoiser, norm: str, layer: str) -> None:
    """One channel of a LayerNorm's output 10,000 times larger, and the weights that read it as much smaller."""
    for name in (f"{norm}.weight", f"{norm}.bias"):
        model.get_parameter(name)[0] *= 1e4
    model.get_parameter(f"{layer}.weight")[:, 0] /= 1e4


@pytest.mark.slow
def test_best_ranges_clip_what_is_rare_and_put_the_worst_layer_first() -> None:
    rng, model = np.random.default_rng(0), untrained(CONFIGS["debug"])[0]
    skewed, even = rng.normal(size=(40_000, 64)), rng.uniform(-1, 1, (4_000, 64))
    skewed[0, 0] = 60.0
    observed = {
        name: Observed(float(values.min()), float(values.max()), [values.astype(np.float32)])
        for name, values in (("blocks.0.up", even), ("blocks.1.up", skewed))
    }
    ranges, worst_first = best_ranges(model, observed)
    assert worst_first == ["blocks.1.up", "blocks.0.up"]
    assert 3 < ranges["blocks.1.up"][1] < 40 and ranges["blocks.0.up"][1] > 0.9
    inputs = torch.from_numpy(skewed).float()
    best, whole = (rounding_errors(inputs, *bounds) for bounds in (ranges["blocks.1.up"], (-5.0, 60.0)))
    assert best.square().sum() < 0.5 * whole.square().sum()


def test_activation_scale_keeps_zero_exact_and_covers_the_range() -> None:
    for low, high in ((-1.0, 3.0), (0.5, 2.0), (-0.17, 8.0), (0.0, 0.0)):
        scale, zero = (float(number) for number in activation_scale(low, high))
        assert 0 <= zero <= LEVELS_U8
        assert (0 - zero) * scale <= min(low, 0) + scale and (LEVELS_U8 - zero) * scale >= high - scale


@pytest.mark.parametrize(
    ("law", "infilling", "passing"),
    [(1.004, 1.009, True), (1.006, 1.0, False), (0.994, None, False), (1.0, 1.02, False), (1.004, None, True)],
)
def test_gate_of_laws_is_half_a_percent_and_one(law: float, infilling: float | None, passing: bool) -> None:
    parity = LawParity(graph="g", scheme="static", law_ratio=law, infilling_ratio=infilling, texts_agreeing=0.0)
    assert passes_law(parity) is passing


def test_agreeing_counts_the_greedy_texts_that_graphs_would_write_themselves() -> None:
    networks = [untrained(CONFIGS["debug"], seed)[:2] for seed in (0, 1)]
    own, other = (row_graphs(blocks_graphs(model, progress.objectives)) for model, progress in networks)
    texts = [own.greedy([1, first, 9], 24) for first in (7, 8)]
    assert agreeing(own, [read(text) for text in texts], 3) == 1.0
    late = [*texts[0][:-1], texts[0][-1] % 30 + 5]  # its last token alone is another
    assert late != texts[0] and agreeing(own, [read(late), read(texts[1])], 3) == 0.5
    expected = sum(other.greedy(text[:3], 24) == text for text in texts) / 2
    assert agreeing(other, [read(text) for text in texts], 3) == expected
