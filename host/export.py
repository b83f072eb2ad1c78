"""Export a trained model as a bundle: `python -m host.export --int8` takes the newest run.

no flag   FP32 graph for the CPU
--int8    INT8 graph for the CPU: every scheme is tried, the fastest that passes the parity gate is kept
--fp16    FP16 graph for CUDA; goes with --int8 or alone
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from host.bundle import StepGraph, check_replaceable, write_bundle
from host.checkpoint import Progress, find_checkpoint, load_model, newest_run
from host.evaluate import HeldOut, evaluate, held_out_files, held_out_split, print_table
from host.graph import step_graph
from host.model import CONFIGS, Denoiser, config_named
from host.parity import MAX_NELBO_CHANGE, MIN_TOP1_AGREEMENT, dropped_mass, measure, passes, trajectories
from host.quantize import SCHEMES, Scheme, quantize, step_feed
from host.runs import read_config
from host.scoring import GraphScorer, TorchScorer
from host.untrained import untrained
from shared.errors import BundleError, ConfigError, run_main
from shared.manifest import TOKENIZER, Parity, SamplingDefaults

TOP_K = 64
CALIBRATION_STORIES = 8
PARITY_STORIES = 8
PARITY_NELBO_STORIES = 128
CALIBRATION_SEED, PARITY_SEED = 1_000, 2_000
GATE = f"NELBO within {MAX_NELBO_CHANGE:.0%} and top-1 agreement of at least {MIN_TOP1_AGREEMENT:.0%}"


def step_ms(graph: onnx.ModelProto, canvas: NDArray[np.int32]) -> float:
    """Median time of one pass over one canvas (L,) on this machine."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = step_feed(canvas, 1.0, timed=len(graph.graph.input) == 2)
    times = []
    for _ in range(25):
        started = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - started)
    return statistics.median(times[5:]) * 1e3


@dataclass(frozen=True)
class Yardstick:
    """What a trained network's graphs are held against: held-out text, and canvases (L,), t that sampling visits."""

    held_out: HeldOut
    canvases: list[tuple[NDArray[np.int32], float]]


def yardstick(model: Denoiser, progress: Progress, held_out: HeldOut) -> Yardstick:
    """Run the reference sampler from the last held-out stories; calibration takes the first."""
    return Yardstick(held_out, trajectories(model, progress.schedule, held_out.canvases[-PARITY_STORIES:], PARITY_SEED))


def held_to(
    yardstick: Yardstick, model: Denoiser, progress: Progress, graph: StepGraph, scheme: str
) -> tuple[Parity, float]:
    """Measure a graph's parity, and print it.  → parity, milliseconds a step on this machine"""
    few = replace(yardstick.held_out, canvases=yardstick.held_out.canvases[:PARITY_NELBO_STORIES])
    parity = measure(model, progress.schedule, GraphScorer(graph.file, graph.model), scheme, few, yardstick.canvases)
    ms = step_ms(graph.model, yardstick.canvases[len(yardstick.canvases) // 2][0])
    verdict = "passes" if passes(parity) else "fails"
    figures = f"NELBO × {parity.nelbo_ratio:.4f}, top-1 agreement {parity.top1_agreement:.1%}, {ms:.1f} ms a step"
    print(f"{graph.precision} {scheme}: {figures}: {verdict} the gate")
    return parity, ms


def best_int8(
    model: Denoiser, progress: Progress, floats: dict[Scheme, onnx.ModelProto], yardstick: Yardstick
) -> tuple[StepGraph, Parity, str]:
    """Quantize by every scheme and keep the fastest that passes the gate.  → graph, its parity, what calibrated it

    Raises BundleError, naming figures, when none passes.
    """
    stories = yardstick.held_out.canvases[:CALIBRATION_STORIES]
    calibration = trajectories(model, progress.schedule, stories, CALIBRATION_SEED)
    found: list[tuple[float, StepGraph, Parity]] = []
    for scheme in SCHEMES:
        graph = StepGraph(quantize(floats[scheme], scheme, calibration), "int8", "cpu")
        parity, ms = held_to(yardstick, model, progress, graph, scheme)
        found.append((ms, graph, parity))
    passing = [entry for entry in found if passes(entry[2])]
    if not passing:
        raise BundleError(f"no INT8 scheme reaches {GATE}; nothing was written: train longer, or leave out --int8")
    _, graph, parity = min(passing, key=lambda entry: entry[0])
    used = (
        f"{len(calibration)} canvases of sampling trajectories"
        if parity.scheme == "static"
        else "at run time, per pass"
    )
    return graph, parity, used


def build_graphs(
    model: Denoiser, progress: Progress, int8: bool, fp16: bool, yardstick: Yardstick | None
) -> tuple[list[StepGraph], list[Parity], str]:
    """The graphs that the flags ask for; an untrained network has no quality to keep, and no yardstick.

    Raises BundleError when a graph misses the gate.  → graphs, parity records, calibration record
    """
    top_k = min(TOP_K, model.config.vocab_size)
    graphs: list[StepGraph] = []
    parities: list[Parity] = []
    calibration = "none"
    if int8:
        floats = {s: step_graph(model, "cpu", top_k, whole_attention=s == "dynamic") for s in SCHEMES}
        if yardstick is None:
            graphs.append(StepGraph(quantize(floats["dynamic"], "dynamic", []), "int8", "cpu"))
        else:
            graph, parity, calibration = best_int8(model, progress, floats, yardstick)
            graphs.append(graph)
            parities.append(parity)
    elif not fp16:
        graphs.append(StepGraph(step_graph(model, "cpu", top_k), "fp32", "cpu"))
    if fp16:
        graphs.append(StepGraph(step_graph(model, "cuda", top_k), "fp16", "cuda"))
        if yardstick is not None:
            parities.append(held_to(yardstick, model, progress, graphs[-1], "half precision")[0])
            if not passes(parities[-1]):
                raise BundleError(f"the FP16 graph misses {GATE}; nothing was written")
    return graphs, parities, calibration


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m host.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m host.export --int8 --fp16 --out bundles/mine",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", type=Path, help="run folder (default: the newest in runs/)")
    what.add_argument(
        "--untrained", choices=list(CONFIGS), help="random weights of this shape instead, for measuring and testing"
    )
    parser.add_argument("--out", type=Path, help="bundle folder (default: bundles/NAME-OF-RUN)")
    parser.add_argument("--int8", action="store_true", help="INT8 graph for the CPU")
    parser.add_argument("--fp16", action="store_true", help="FP16 graph for CUDA")
    parser.add_argument("--target", choices=["cpu", "cuda"], help="only the graphs of this target")
    parser.add_argument("--source", type=Path, help="text files to measure on (default: the run's validation split)")
    parser.add_argument("--stories", type=int, help="measure on the first so many only")
    parser.add_argument("--steps", type=int, default=SamplingDefaults().steps, help="passes a request gets by default")
    return parser.parse_args()


def selected_flags(args: argparse.Namespace) -> tuple[bool, bool]:
    """Which precisions to build: --target takes away what is not for it.  → int8, fp16"""
    if args.target == "cuda" and not args.fp16:
        raise ConfigError("--target cuda needs --fp16, the precision that graph comes in")
    if args.target == "cpu" and args.fp16 and not args.int8:
        raise ConfigError("--fp16 is the precision of the CUDA graph: leave out --target cpu, or --fp16")
    return args.int8 and args.target != "cuda", args.fp16 and args.target != "cpu"


def main() -> None:
    """Export a run, or an untrained network."""
    args = parse_arguments()
    int8, fp16 = selected_flags(args)
    if args.steps < 1 or (args.stories is not None and args.stories < 1):
        raise ConfigError("--steps and --stories must be at least 1")
    if args.untrained:
        out = args.out or Path("bundles") / f"untrained-{args.untrained}"
        check_replaceable(out)
        export_untrained(args.untrained, out, int8, fp16)
        return
    run = args.run or newest_run()
    out = args.out or Path("bundles") / run.resolve().name
    check_replaceable(out)  # now, not after minutes of measuring
    model, progress = load_model(find_checkpoint(run))
    if progress.objective == "ar":
        raise ConfigError(f"{run} is an autoregressive run: start a diffusion run from it with host.train --init {run}")
    tokenizer = run / TOKENIZER
    if args.source:
        held_out = held_out_files(args.source, tokenizer, args.stories)
    else:
        held_out = held_out_split(read_config(run).data, args.stories)
    measured = yardstick(model, progress, held_out)
    graphs, parities, calibration = build_graphs(model, progress, int8, fp16, measured)
    top_k = min(TOP_K, model.config.vocab_size)
    for temperature in (0.7, 1.0, 1.5):
        dropped = dropped_mass(model, measured.canvases, top_k, temperature)
        print(f"outside the top {top_k} at temperature {temperature}: {dropped:.2%} of the probability")
    evaluations = [evaluate(TorchScorer(model), held_out, progress.schedule)]
    for graph in graphs:
        if graph.target == "cpu":
            evaluations.append(evaluate(GraphScorer(graph.file, graph.model), held_out, progress.schedule))
    print_table(evaluations)
    write_bundle(
        out, model, progress, tokenizer, graphs, top_k, evaluations, parities,
        calibration, SamplingDefaults(steps=args.steps),
    )  # fmt: skip
    report(out, graphs)


def export_untrained(config: str, out: Path, int8: bool, fp16: bool) -> None:
    """A bundle of random weights with a tokenizer of random words."""
    model, progress, tokenizer = untrained(config_named(config))
    graphs, _, _ = build_graphs(model, progress, int8, fp16, None)
    with tokenizer as path:
        write_bundle(out, model, progress, path, graphs, min(TOP_K, model.config.vocab_size))
    report(out, graphs)


def report(out: Path, graphs: Sequence[StepGraph]) -> None:
    """Say what was written, and what to do with it."""
    sizes = ", ".join(f"{g.file} {(out / g.file).stat().st_size / 1e6:.1f} MB" for g in graphs)
    print(f'{out}: {sizes}; try it with: python -m edge.generate --bundle {out} "Once upon a time"')


if __name__ == "__main__":
    run_main(main)
