"""`python -m host.export`: a trained model as a bundle, or as a folder for the Hugging Face libraries."""

import argparse
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from host.evaluate.laws import law_figures, print_law_figures
from host.evaluate.likelihood import STORIES, HeldOut, evaluate, held_out_files, held_out_split, print_table
from host.evaluate.scorers import GraphScorer, Scorer, TorchScorer
from host.export.arguments import parse_arguments
from host.export.blocks_pipeline import TEXT_STORIES, Blocks, blocks_graphs, blocks_int8, cuda_blocks, law_reference
from host.export.bundle_writer import BundleGraph, check_replaceable, write_bundle
from host.export.conditions_onto import add_conditions, check_measurable
from host.export.conditions_pipeline import conditions_of_run, conditions_spec, measured_conditions, reference_given
from host.export.hub.publish import Dtype, check_publishable, figures_of_bundle, measured_figures, publish, training_of
from host.export.law_parity import graph_laws
from host.export.parity import dropped_mass
from host.export.pipeline import Wanted, build, build_untrained, check
from host.export.random_weights import untrained
from host.export.reference import reference_of
from host.export.sensitivity import print_errors
from host.export.shared_weights import with_shared_weights
from host.export.stages import Stages
from host.model.drafter import DEPTH
from host.model.network import config_named
from host.sampling.reference import TOP_K
from host.train.checkpoint import newest_run
from host.train.conditioner import conditioner_of
from host.train.run_folder import data_of, load_run, pictures_of, training_stages
from shared.conditions import MAX_GUIDANCE
from shared.errors import ConfigError, run_main
from shared.manifest import MAX_STEPS, TOKENIZER, Evaluation, LawFigures, Parity, SamplingDefaults


def wanted_graphs(args: argparse.Namespace) -> Wanted:
    """Which graphs to build: --target takes away what is not for it. Raises ConfigError when nothing is left."""
    cpu, cuda = args.target != "cuda", args.target != "cpu"
    wanted = Wanted(
        cpu_int8=args.int8 and cpu,
        cpu_fp32=not args.int8 and not args.fp16 and cpu,
        cuda_fp16=args.fp16 and cuda,
        cuda_int8=args.int8 and cuda,
        fp32_norms=args.fp32_norms,
    )
    if args.target == "cuda" and not (args.int8 or args.fp16):
        raise ConfigError("--target cuda needs --fp16 or --int8, the precisions that its graphs come in")
    if args.target == "cpu" and args.fp16 and not args.int8:
        raise ConfigError("--fp16 is the precision of the CUDA graph: leave out --target cpu, or --fp16")
    if args.fp32_norms and not (wanted.cuda_fp16 or wanted.cuda_int8):
        raise ConfigError("--fp32-norms is about CUDA graphs: add --fp16 or --int8")
    return wanted


def main() -> None:
    """Export a run, or an untrained network."""
    args = parse_arguments()
    check_published(args)
    check_added(args)
    wanted = wanted_graphs(args)
    if not 1 <= args.steps <= MAX_STEPS or args.stories < 1:
        raise ConfigError(f"--stories must be at least 1, --steps from 1 to {MAX_STEPS}")
    if not 0 <= args.guidance <= MAX_GUIDANCE:
        raise ConfigError(f"--guidance must be a number from 0 to {MAX_GUIDANCE:g}, not {args.guidance}")
    if not 0 <= args.temperature <= 10:
        raise ConfigError(f"--temperature must be a number from 0 to 10, not {args.temperature}")
    defaults = SamplingDefaults(steps=args.steps, temperature=args.temperature)
    if args.untrained:
        if args.report or args.source or args.stories != STORIES:
            raise ConfigError("--report, --source and --stories measure a trained network: not with --untrained")
        out = args.out or Path("bundles") / f"untrained-{args.untrained}"
        check_replaceable(out)
        export_untrained(args.untrained, out, wanted=wanted, defaults=defaults, conditions=args.conditions)
        return
    if args.conditions:
        raise ConfigError("--conditions is for --untrained: a run that learned conditions is exported with them")
    run = args.run or newest_run()
    if args.conditions_onto:
        out = args.out or Path("bundles") / run.resolve().name
        measure_on = partial(held_out_of, run, args.source, args.stories)
        add_conditions(run, args.conditions_onto, out=out, measure_on=measure_on, guidance=args.guidance)
        return
    figures: Path | None = args.hf_figures
    if args.hf:
        check_publishable(args.hf)
        training = training_of(run, load_run(run)[1])
        if figures:
            figures_of_bundle(training, figures)
    if args.hf is None or wants_bundle(args):
        out = figures = args.out or Path("bundles") / run.resolve().name
        check_replaceable(out)
        export_run(
            run,
            out,
            wanted=wanted,
            defaults=defaults,
            source=args.source,
            stories=args.stories,
            report=args.report,
            guidance=args.guidance,
        )
    if args.hf:
        held_out = partial(held_out_of, run, args.source, args.stories)
        publish_run(run, args.hf, defaults=defaults, dtype=args.hf_dtype, figures=figures, held_out=held_out)


def wants_bundle(args: argparse.Namespace) -> bool:
    """Whether a flag beside --hf is about a bundle."""
    return any((args.out, args.int8, args.fp16, args.target, args.report))


def check_published(args: argparse.Namespace) -> None:
    """ConfigError when flags do not go with or without --hf."""
    for name in ("hf_dtype", "hf_figures"):
        if getattr(args, name) and args.hf is None:
            raise ConfigError(f"{_flag(name)} needs --hf OUT")
    if args.hf and args.untrained:
        raise ConfigError("--hf publishes a trained network: not with --untrained")
    if args.hf_figures and (wants_bundle(args) or args.source or args.stories != STORIES):
        raise ConfigError("--hf-figures says where the figures are: not with a bundle to export, --source or --stories")


def check_added(args: argparse.Namespace) -> None:
    """ConfigError when --conditions-onto stands beside a flag about what is taken from its bundle."""
    flags = ("untrained", "conditions", "int8", "fp16", "fp32_norms", "target", "hf", "report")
    given = [name for name in flags if getattr(args, name)]
    given += [name for name in ("steps", "temperature") if getattr(args, name) != getattr(SamplingDefaults(), name)]
    if args.conditions_onto and given:
        raise ConfigError(f"--conditions-onto takes all but the conditions from its bundle: not with {_flag(given[0])}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def held_out_of(run: Path, source: Path | None, stories: int) -> HeldOut:
    """The text to measure a run on."""
    return held_out_files(source, run / TOKENIZER, stories) if source else held_out_split(data_of(run), stories)


def publish_run(
    run: Path,
    out: Path,
    *,
    defaults: SamplingDefaults,
    dtype: Dtype | None,
    figures: Path | None,
    held_out: Callable[[], HeldOut],
) -> None:
    """A run for the hub, with the figures of that bundle, or else with what it measures on the held-out text."""
    model, progress = load_run(run)
    training = training_of(run, progress)
    if figures is not None:
        training = figures_of_bundle(training, figures)
    else:
        training = measured_figures(training, model, held_out())
    publish(out, model, training=training, tokenizer=run / TOKENIZER, dtype=dtype or "float32", defaults=defaults)


def export_run(
    run: Path,
    out: Path,
    *,
    wanted: Wanted,
    defaults: SamplingDefaults,
    source: Path | None,
    stories: int,
    report: bool,
    guidance: float,
) -> None:
    """The bundle as soon as its graphs pass the gate, then its figures, with which its manifest is written again."""
    model, progress = load_run(run)
    check_measurable(run, model)
    learned = progress.objectives
    check_learned(run, learned, wanted)
    tokenizer = run / TOKENIZER
    held_out = held_out_of(run, source, stories)
    takes = model.conditions is not None and (wanted.cpu_int8 or wanted.cpu_fp32)
    stages = Stages(stage_costs(wanted, learned, stories=len(held_out.canvases), report=report, conditions=takes))
    conditioner = None if model.conditions is None else conditioner_of(data_of(run), pictures_of(run))
    blocks = Blocks([])
    text = held_out.canvases
    if not source:
        text = data_of(run).train.first(TEXT_STORIES)
    on_cuda: list[Blocks] = []
    if "ar" in learned and (wanted.cpu_int8 or wanted.cuda):
        stages.begin(BLOCKS)
        laws_of = law_reference(model, learned, held_out, text)
        if wanted.cpu_int8:
            blocks = blocks_int8(laws_of)
        if wanted.cuda and conditioner is not None:
            laws_of = reference_given(laws_of, conditioner=conditioner, train=data_of(run).train)
        on_cuda = cuda_blocks(laws_of, wanted.cuda, wanted.fp32_norms)
        check([graph for one in on_cuda for graph in one.graphs])
    elif wanted.cpu_fp32:
        blocks = Blocks(blocks_graphs(model, learned))
    conditions = Blocks([])
    if takes and conditioner is not None:
        stages.begin(CONDITIONS)
        train, int8 = data_of(run).train, wanted.cpu_int8
        conditions = conditions_of_run(
            model, learned, conditioner=conditioner, train=train, held_out=held_out, int8=int8
        )
    top_k = min(TOP_K, model.config.vocab_size)
    built = (blocks, *on_cuda, conditions)
    graphs, parities = [graph for one in built for graph in one.graphs], list[Parity]()
    calibration = "; ".join(one.calibration for one in built if one.calibration)
    reference, canvases = None, list[BundleGraph]()
    if "canvas" in learned:
        stages.begin(SAMPLING)
        reference = reference_of(model, progress, held_out)
        for temperature in (0.7, 1.0, 1.5):
            dropped = dropped_mass(model, reference.canvases[::4], top_k=top_k, temperature=temperature)
            print(f"outside the top {top_k} at temperature {temperature}: {dropped:.2%} of the probability")
        canvases, parities, of_canvases = build(wanted, reference, stages)
        graphs = graphs + canvases
        calibration = "; ".join(part for part in (calibration, of_canvases) if part)
    graphs = with_shared_weights(graphs)

    spec = None if conditioner is None else conditions_spec(guidance)

    def write(evaluations: Sequence[Evaluation], laws: Sequence[LawFigures]) -> None:
        write_bundle(
            out,
            model,
            progress=progress,
            tokenizer=tokenizer,
            graphs=graphs,
            top_k=top_k,
            stages=training_stages(run),
            evaluations=evaluations,
            laws=laws,
            parity=parities,
            law_parity=[parity for one in built for parity in one.parity],
            calibration=calibration or "none",
            defaults=defaults,
            conditions=spec,
        )

    write([], [])
    say_what_was_written(out, graphs)
    stages.begin(FIGURES)
    laws: list[LawFigures] = []
    if blocks.graphs:
        laws = [law_figures(model, held_out, learned), graph_laws(blocks.graphs, held_out)]
        print_law_figures(laws)
    if takes and conditioner is not None:
        spec = measured_conditions(model, conditioner=conditioner, held_out=held_out, guidance=guidance, bundle=out)
    evaluations: list[Evaluation] = []
    if reference is not None:
        few = replace(held_out, canvases=held_out.canvases[:CUDA_STORIES])
        measured: list[tuple[Scorer, HeldOut]] = [(TorchScorer(model), held_out)]
        for graph in canvases:
            if report or graph.target == "cpu":
                measured.append((GraphScorer(graph.file, graph.model), held_out if graph.target == "cpu" else few))
        evaluations = [evaluate(scorer, text, progress.schedule, draws=1) for scorer, text in measured]
        print_table(evaluations)
    write(evaluations, laws)
    if report and reference is not None:
        stages.begin(REPORT)
        print_errors(reference.worst_first)


def check_learned(run: Path, learned: Collection[str], wanted: Wanted) -> None:
    """ConfigError when nothing that is wanted can be made of what a run has learned."""
    if not {"ar", "canvas"}.intersection(learned):
        raise ConfigError(f"{run} learned neither ar nor canvas: start a run from it with host.train --init {run}")


BLOCKS: Final = "graphs of blocks"
CONDITIONS: Final = "graphs of conditions"
SAMPLING: Final = "canvases that sampling visits"
CUDA_STORIES: Final = 64  # that a report measures a CUDA graph on: ONNX Runtime takes 0.1 s a pass of it
FIGURES: Final = "figures on held-out text (the bundle is there already)"
REPORT: Final = "errors of the layers"


def stage_costs(
    wanted: Wanted, learned: Collection[str], *, stories: int, report: bool, conditions: bool
) -> dict[str, float]:
    """What each stage takes, roughly, in passes of the network over a canvas, as measured on `tiny`."""
    canvas, blocks = "canvas" in learned, "ar" in learned and (wanted.cpu_int8 or wanted.cpu_fp32)
    of_blocks = (1400 * wanted.cpu_int8 + 220 * len(wanted.cuda)) * ("ar" in learned)
    costs: dict[str, float] = {BLOCKS: of_blocks} if of_blocks else {}
    costs |= {CONDITIONS: 3000} if conditions else {}
    costs |= {SAMPLING: 1100} if canvas else {}
    costs |= {"INT8 for the CPU": 650} if canvas and wanted.cpu_int8 else {}
    costs |= {"FP16 for CUDA": 200} if canvas and wanted.cuda_fp16 else {}
    costs |= {"INT8 for CUDA": 1700} if canvas and wanted.cuda_int8 else {}
    on_cpu = 0.6 * (wanted.cpu_int8 or wanted.cpu_fp32)
    on_cuda = 1.5 * wanted.cuda_fp16 + 2.5 * wanted.cuda_int8
    of_laws = 5 * stories + 3000 if blocks else 0
    costs[FIGURES] = of_laws + 2 * (stories * (1 + on_cpu) + min(stories, CUDA_STORIES) * on_cuda * report) * canvas
    return costs | ({REPORT: 400} if report and canvas else {})


def export_untrained(
    config: str, out: Path, *, wanted: Wanted, defaults: SamplingDefaults, conditions: bool = False
) -> None:
    """A bundle of random weights with a tokenizer of random words."""
    shape = replace(config_named(config), draft_depth=DEPTH, conditions=conditions)
    model, progress, tokenizer = untrained(shape)
    graphs = with_shared_weights(build_untrained(wanted, model, progress.objectives))
    with tokenizer as path:
        top_k = min(TOP_K, model.config.vocab_size)
        write_bundle(
            out,
            model,
            progress=progress,
            tokenizer=path,
            graphs=graphs,
            top_k=top_k,
            defaults=defaults,
            conditions=conditions_spec() if any(graph.role == "encode.text" for graph in graphs) else None,
        )
    say_what_was_written(out, graphs)


def say_what_was_written(out: Path, graphs: Sequence[BundleGraph]) -> None:
    """Files, sizes, and what to do with them."""
    sizes = ", ".join(f"{g.file} {(out / g.file).stat().st_size / 1e6:.1f} MB" for g in graphs)
    on_cpu = any(g.target == "cpu" for g in graphs)
    print(f"{out}: {sizes}" + (f'; try it with: python -m edge.generate --bundle {out} "Once upon a time"' * on_cpu))


if __name__ == "__main__":
    run_main(main)
