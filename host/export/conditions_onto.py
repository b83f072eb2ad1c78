"""The conditions that a run has learned, beside the graphs of a bundle of the same network, which stay as they are."""

from collections.abc import Callable, Sequence
from dataclasses import replace as evolve
from pathlib import Path
from typing import Final

import onnx
from msgspec.structs import replace

from host.evaluate.likelihood import HeldOut
from host.export.bundle_writer import BundleGraph, check_replaceable, listed, made_with, write_manifest
from host.export.conditions_pipeline import conditions_of_run, conditions_spec, measured_conditions
from host.export.stages import Stages
from host.export.step_graph import step_graph
from host.files import swapped_in
from host.model.network import Denoiser, count_parameters
from host.train.conditioner import conditioner_of
from host.train.published import is_published
from host.train.run_folder import data_of, load_run, pictures_of, training_stages
from host.train.stages import CONDITION_STAGES
from shared.conditions import Conditions
from shared.errors import ConfigError
from shared.manifest import (
    TOKENIZER,
    Graph,
    Manifest,
    Role,
    TrainingStage,
    find_graph,
    has_role,
    read_manifest,
    verified_bytes,
)

KEPT: Final[tuple[Role, ...]] = ("step", "prefill", "draft")
CONDITIONS: Final = "graphs of conditions"
FIGURES: Final = "figures on held-out text (the bundle is there already)"
CALIBRATED: Final = (".in.scale", ".in.zero")
"""Endings of constants that come from text, not from the network."""


def check_measurable(run: Path, model: Denoiser) -> None:
    """ConfigError for a published folder with conditions, whose figures need the data that it does not hold."""
    if model.conditions is not None and is_published(run):
        raise ConfigError(
            f"{run} does not hold the data that its conditions are measured on: start a run from it with "
            f"host.train --stage pictures --init {run}, and export that"
        )


def check_onto(bundle: Path, out: Path) -> None:
    """Fail early: ConfigError where conditions cannot be added to a bundle, or not written to `out`; BundleError."""
    if out.resolve() == bundle.resolve():
        raise ConfigError(f"--out {out} is the bundle itself: choose another --out")
    if not has_role(read_manifest(bundle), "cpu", "step"):
        raise ConfigError(f"--conditions-onto {bundle}: it has no step graph for the CPU, and so no blocks there")
    check_replaceable(out)


def add_conditions(run: Path, bundle: Path, *, out: Path, measure_on: Callable[[], HeldOut], guidance: float) -> None:
    """A bundle of the graphs of blocks for the CPU of `bundle`, byte by byte, and a run's graphs of conditions.

    They are in INT8 if the bundle's step graph is. Its figures are kept, as far as they are of these graphs.
    measure_on: called once all is checked.

    Raises ConfigError when the run is not of the same network, or has learned no conditions; BundleError.
    """
    check_onto(bundle, out)
    manifest, (model, progress) = read_manifest(bundle), load_run(run)
    step = find_graph(bundle, manifest, "cpu", "step")
    kept = [graph for role in KEPT for graph in manifest.graphs if (graph.target, graph.role) == ("cpu", role)]
    if model.conditions is None:
        raise ConfigError(f"{run} has learned no conditions: train them with host.train --stage conditions")
    check_measurable(run, model)
    if progress.tokenizer_sha256 != manifest.tokenizer_sha256:
        raise ConfigError(f"{run} has another tokenizer than {bundle}")
    if other := difference(onnx.load_from_string(verified_bytes(bundle, step.file, step.sha256)), model):
        raise ConfigError(f"{run} is of another network than {bundle}: {other} of {step.file} differs")
    held_out, data = measure_on(), data_of(run)
    stages = Stages({CONDITIONS: 3, FIGURES: 2})
    stages.begin(CONDITIONS)
    conditioner = conditioner_of(data, pictures_of(run))
    made = conditions_of_run(
        model,
        progress.objectives,
        conditioner=conditioner,
        train=data.train,
        held_out=held_out,
        int8=step.precision == "int8",
    )
    files, history = {graph.file for graph in kept}, merged_stages(manifest.data.stages, training_stages(run))
    drafts = manifest.blocks.window if manifest.blocks and has_role(manifest, "cpu", "draft") else 0
    manifest = replace(
        manifest,
        name=out.name,
        model=replace(manifest.model, parameters=count_parameters(evolve(model.config, draft_depth=drafts))),
        decoders=("blocks",),
        evaluations=(),
        parity=(),
        laws=tuple(one for one in manifest.laws if one.graph in {*files, "torch fp32"}),
        law_parity=(*(one for one in manifest.law_parity if one.graph in files), *made.parity),
        calibration="; ".join(part for part in (_calibration(manifest, files), made.calibration) if part) or "none",
        data=replace(manifest.data, stages=history, tokens_seen=sum(stage.tokens for stage in history)),
        made_with=made_with(),
    )
    write_beside(bundle, out, manifest=manifest, kept=kept, graphs=made.graphs, conditions=conditions_spec(guidance))
    stages.begin(FIGURES)
    found = measured_conditions(model, conditioner=conditioner, held_out=held_out, guidance=guidance, bundle=out)
    write_beside(bundle, out, manifest=manifest, kept=kept, graphs=made.graphs, conditions=found)


def merged_stages(of_bundle: Sequence[TrainingStage], of_run: Sequence[TrainingStage]) -> tuple[TrainingStage, ...]:
    """What a bundle's blocks went through, with its drafter, and then a run's conditions; those alone are a run's."""
    body = [stage for stage in of_bundle if stage in of_run or stage.objectives not in CONDITION_STAGES]
    added = [stage for stage in of_run if stage not in body and stage.objectives in CONDITION_STAGES]
    return (*body, *added)


def difference(step: onnx.ModelProto, model: Denoiser) -> str | None:
    """A constant of a step graph that is not the network's, but for the scales of what its layers read."""
    known = {constant.name: constant for constant in step.graph.initializer}
    ends = CALIBRATED[0]
    ranges = {name.removesuffix(ends): (0.0, 1.0) for name in known if name.endswith(ends)}
    for constant in step_graph(model, ranges or None).graph.initializer:
        if known.get(constant.name) != constant and not constant.name.endswith(CALIBRATED):
            return str(constant.name)
    return None


def write_beside(
    bundle: Path,
    out: Path,
    *,
    manifest: Manifest,
    kept: Sequence[Graph],
    graphs: Sequence[BundleGraph],
    conditions: Conditions,
) -> None:
    """Files of `bundle`, hashes checked, and graphs beside them. manifest: without these graphs and `conditions`."""
    with swapped_in(out) as folder:
        for file, sha256 in [*((g.file, g.sha256) for g in kept), (TOKENIZER, manifest.tokenizer_sha256)]:
            (folder / file).write_bytes(verified_bytes(bundle, file, sha256))
        for graph in graphs:
            onnx.save(graph.model, folder / graph.file)
        every = (*kept, *(listed(folder, graph) for graph in graphs))
        write_manifest(folder, replace(manifest, graphs=every, conditions=conditions))


def _calibration(manifest: Manifest, files: set[str]) -> str:
    """What a manifest says of these files: its parts begin with the file's name."""
    return "; ".join(part for part in manifest.calibration.split("; ") if part.split(":")[0] in files)
