"""`host.export --conditions-onto`: the graphs of a bundle stay, and what does not go with them is refused early."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edge.serving.loaded_bundle import LoadedBundle
from host.export import __main__ as export
from host.export.conditions_onto import difference, merged_stages
from host.export.pipeline import Wanted
from host.export.random_weights import untrained
from host.export.step_graph import step_graph
from host.model.network import config_named, count_parameters
from host.train.checkpoint import BEST
from host.train.run_folder import load_run, training_stages
from shared.manifest import CONDITIONED_ROLES, SamplingDefaults, TrainingStage, read_manifest
from shared.messages import GenerateRequest
from tests.support.commands import call, refusal

SHAPE = replace(config_named("debug"), draft_depth=3, conditions=True)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--int8"], "--conditions-onto takes all but the conditions from its bundle: not with --int8"),
        (["--fp32-norms"], "--conditions-onto takes all but the conditions from its bundle: not with --fp32-norms"),
        (["--hf", "{tmp}/hub"], "--conditions-onto takes all but the conditions from its bundle: not with --hf"),
        (["--steps", "8"], "--conditions-onto takes all but the conditions from its bundle: not with --steps"),
        (["--guidance", "6"], "--guidance must be a number from 0 to 5, not 6.0"),
        (["--out", "{bundle}"], "--out {bundle} is the bundle itself: choose another --out"),
        (["--out", "{tmp}/text"], "{tmp}/text exists and is not a bundle: choose another --out"),
        (["--conditions-onto", "{tmp}"], "{tmp} is not a bundle: cannot read manifest.json"),
        (["--out", "{tmp}/new"], "{run} has learned no conditions: train them with host.train --stage conditions"),
    ],
)
def test_conditions_onto_says_before_the_work_what_it_cannot(
    joint_runs: tuple[Path, Path],
    blocks_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    sentence: str,
) -> None:
    (tmp_path / "text").write_text("a file")
    names = {"tmp": tmp_path, "run": joint_runs[1], "bundle": blocks_bundle}
    given = ["--run", str(joint_runs[1]), "--conditions-onto", str(blocks_bundle), "--source", "nowhere.txt"]
    _, said = refusal(capsys, export.main, *given, *(flag.format(**names) for flag in flags))
    assert said.startswith(sentence.format(**names)), said
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_conditions_onto_a_bundle_without_blocks_are_refused(
    joint_runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "canvas"
    wanted = Wanted(cuda_fp16=True)
    export.export_untrained("debug", bundle, wanted=wanted, defaults=SamplingDefaults())
    _, said = refusal(capsys, export.main, "--run", joint_runs[1], "--conditions-onto", bundle, "--out", tmp_path / "b")
    assert said == f"--conditions-onto {bundle}: it has no step graph for the CPU, and so no blocks there"


@pytest.mark.parametrize("int8", [True, False])
def test_difference_of_networks_is_seen_in_their_step_graphs(int8: bool) -> None:
    """Whatever scales the inputs of layers have, and with a drafter and conditions that differ."""
    model, other = untrained(SHAPE)[0], untrained(SHAPE)[0]
    ranges = {"blocks.0.qkv": (-2.0, 3.0), "blocks.1.up": (-1.0, 1.0), "head": (-4.0, 4.0)} if int8 else None
    step = step_graph(model, ranges)
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        for name in ("conditions.reads.0.q.weight", "drafter.depths.0.up.weight"):
            parameters[name].add_(1.0)
        assert difference(step, other) is None
        parameters["blocks.1.up.weight"].mul_(1.1)
    assert difference(step, other) == ("blocks.1.up.scale" if int8 else "blocks.1.up.weight")
    assert difference(step, untrained(replace(SHAPE, layers=SHAPE.layers + 1))[0]) is not None


def test_merged_stages_are_the_blocks_of_the_bundle_and_the_conditions_of_the_run() -> None:
    """Each stage once; neither conditions that are replaced, nor a drafter that stays behind."""
    body, draft, ours, theirs, reads = (
        TrainingStage(name=name, objectives=objectives, tokens=tokens)
        for name, objectives, tokens in (
            ("a", ("ar", "infill"), 9),
            ("d", ("drafter",), 2),
            ("old", ("conditions",), 3),
            ("new", ("conditions",), 4),
            ("r", ("reads",), 1),
        )
    )
    other = TrainingStage(name="e", objectives=("drafter",), tokens=5)
    assert merged_stages((body, draft), (body, theirs)) == (body, draft, theirs)
    assert merged_stages((body, draft, ours), (body, other, theirs, reads)) == (body, draft, theirs, reads)
    assert merged_stages((body, ours, draft), (body, ours, reads)) == (body, ours, draft, reads)


@pytest.mark.slow
def test_conditions_are_added_to_a_bundle_whose_graphs_stay_as_they_are(
    runs: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, drafter, conditions = runs
    bundle, out = tmp_path / "b", tmp_path / "both"
    call(export.main, "--run", drafter, "--out", bundle, "--int8", "--target", "cpu", "--stories", 12)
    adding = ["--run", conditions, "--conditions-onto", bundle, "--stories", 12]
    call(export.main, *adding, "--out", out, "--guidance", 1.5)
    before, after = read_manifest(bundle), read_manifest(out)
    kept = [graph for graph in before.graphs if graph.target == "cpu"]
    assert {"step", "prefill", "draft"} == {graph.role for graph in kept}
    assert [*after.graphs[:3]] == kept
    assert all((out / g.file).read_bytes() == (bundle / g.file).read_bytes() for g in kept)
    added = {graph.role: graph.precision for graph in after.graphs[3:]}
    assert added == dict.fromkeys((*CONDITIONED_ROLES["cpu"], "prefill.conditioned"), "int8")
    assert (after.laws, after.blocks) == (before.laws, before.blocks)
    assert [p.graph for p in after.law_parity] == ["step.cpu.int8.onnx", "step.conditioned.cpu.int8.onnx"]
    assert after.law_parity[:1] == before.law_parity
    history = (*training_stages(drafter), training_stages(conditions)[-1])  # the drafter is the bundle's
    assert (after.data.stages, after.data.tokens_seen) == (history, sum(stage.tokens for stage in history))
    whole = replace(load_run(conditions)[0].config, draft_depth=load_run(drafter)[0].config.draft_depth)
    assert after.model.parameters == count_parameters(whole) > before.model.parameters
    assert after.calibration.startswith(f"{before.calibration}; step.conditioned.cpu.int8.onnx: ")
    assert after.conditions is not None and after.conditions.guidance == 1.5 and after.conditions.asked_for
    loaded = LoadedBundle.load(out, threads=1)
    assert loaded.run(loaded.prepare(GenerateRequest(prompt="Tom", seed=1, words=["cake"]))).text
    loaded.close()
    other = tmp_path / "other"
    shutil.copytree(conditions, other)
    weights = load_file(other / BEST)
    weights["ema.blocks.1.up.weight"] *= 1.1
    with safe_open(other / BEST, "pt") as file:
        save_file(weights, other / BEST, metadata=file.metadata())
    said = refusal(capsys, export.main, *["--run", other, *adding[2:]], "--out", tmp_path / "x")[1]
    assert said == f"{other} is of another network than {bundle}: blocks.1.up.scale of step.cpu.int8.onnx differs"
    assert not (tmp_path / "x").exists()
