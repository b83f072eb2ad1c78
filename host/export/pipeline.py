"""From a trained network to the graphs that ship: quantized, measured, and kept only when they pass the parity gate."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from host.evaluate.likelihood import HeldOut
from host.evaluate.scorers import Canvases, GraphScorer, session_of, step_feed
from host.export.bundle_writer import StepGraph
from host.export.cpu_graph import cpu_graph
from host.export.cpu_int8 import SCHEMES, Scheme, quantize
from host.export.cuda_graph import cuda_graph
from host.export.cuda_qdq import RANGES, Range, activation_ranges, quantize_linears
from host.export.lint import slow_shapes, violations
from host.export.parity import MAX_NELBO_CHANGE, MIN_TOP1_AGREEMENT, measure, passes, stratified, trajectories
from host.export.sensitivity import LayerError, layer_errors
from host.model.network import Denoiser
from host.sampling.reference import TOP_K
from host.train.checkpoint import Progress
from shared.errors import BundleError
from shared.manifest import Parity

CALIBRATION_STORIES: Final = 8
CALIBRATION_STEPS: Final = 64
STRATA: Final = 8  # bands of mask rates, each of which gives as many calibration canvases
CANVASES_OF_EACH: Final = 16
PARITY_STORIES: Final = 8
PARITY_NELBO_STORIES: Final = 128
CALIBRATION_SEED, PARITY_SEED = 1_000, 2_000
FP16: Final = "half precision"
GATE: Final = f"NELBO within {MAX_NELBO_CHANGE:.0%} and top-1 agreement of at least {MIN_TOP1_AGREEMENT:.0%}"


@dataclass(frozen=True)
class Wanted:
    """What to build."""

    cpu_int8: bool = False
    cpu_fp32: bool = False
    cuda_fp16: bool = False
    cuda_int8: bool = False
    fp32_norms: bool = False  # on CUDA


@dataclass(frozen=True)
class Yardstick:
    """What a trained network's graphs are held against: held-out text, and canvases (L,), t that sampling visits."""

    model: Denoiser
    progress: Progress
    held_out: HeldOut
    canvases: Canvases
    calibration: Canvases


@dataclass(frozen=True)
class Built:
    """A graph that passed the gate."""

    graph: StepGraph
    parity: Parity
    step_ms: float  # on this machine


def yardstick(model: Denoiser, progress: Progress, held_out: HeldOut) -> Yardstick:
    """Run the reference sampler: calibration starts from the first held-out stories, parity from the last."""
    stories = held_out.canvases
    visited = trajectories(model, progress.schedule, stories[:CALIBRATION_STORIES], CALIBRATION_SEED, CALIBRATION_STEPS)
    calibration = stratified(visited, STRATA, CANVASES_OF_EACH, CALIBRATION_SEED)
    canvases = trajectories(model, progress.schedule, stories[-PARITY_STORIES:], PARITY_SEED)
    return Yardstick(model, progress, held_out, canvases, calibration)


def median_step_ms(graph: onnx.ModelProto, canvas: NDArray[np.int32]) -> float:
    """Median time of one pass over one canvas (L,) on this machine."""
    session = session_of(graph)
    feed = step_feed(session, canvas, 1.0)
    times = []
    for _ in range(25):
        started = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - started)
    return statistics.median(times[5:]) * 1e3


def held_to(yardstick: Yardstick, graph: StepGraph, scheme: str, kept_float: Sequence[str] = ()) -> Built:
    """Measure a graph's parity and speed, and print them."""
    few = replace(yardstick.held_out, canvases=yardstick.held_out.canvases[:PARITY_NELBO_STORIES])
    scorer = GraphScorer(graph.file, graph.model)
    schedule = yardstick.progress.schedule
    parity = measure(yardstick.model, schedule, scorer, scheme, few, yardstick.canvases, kept_float)
    ms = median_step_ms(graph.model, yardstick.canvases[len(yardstick.canvases) // 2][0])
    verdict = "passes" if passes(parity) else "fails"
    figures = f"NELBO × {parity.nelbo_ratio:.4f}, top-1 agreement {parity.top1_agreement:.1%}, {ms:.1f} ms a step"
    kept = f", {len(kept_float)} layers in float" if kept_float else ""
    print(f"{graph.target} {graph.precision} {scheme}{kept}: {figures}: {verdict} the gate")
    return Built(graph, parity, ms)


Make = Callable[[Sequence[str]], StepGraph]
"""Makes a quantized graph, given the layers to leave in float."""


def first_to_pass(
    schemes: Mapping[str, Make], worst_first: Sequence[LayerError], yardstick: Yardstick, target: str
) -> list[Built]:
    """Quantize every layer by every scheme; while none passes the gate, leave 1, 2, 4 … of the worst layers in float.

    → those that pass; BundleError when none does with half of the layers in float
    """
    count = 0
    while count <= len(worst_first) // 2:
        kept = [error.layer for error in worst_first[:count]]
        tried = [held_to(yardstick, make(kept), scheme, kept) for scheme, make in schemes.items()]
        if passing := [built for built in tried if passes(built.parity)]:
            if kept:
                print(f"left in float: {', '.join(kept)}")
            return passing
        count = 2 * count or 1
    raise BundleError(
        f"no INT8 scheme for {target} reaches {GATE}, even with half of the layers in float; nothing was written: "
        "train longer, or leave out --int8"
    )


def cpu_int8(yardstick: Yardstick, top_k: int, worst_first: Sequence[LayerError]) -> Built:
    """The fastest of ONNX Runtime's schemes that pass the gate; BundleError when none does."""
    exact = cpu_graph(yardstick.model, top_k)

    def made_by(scheme: Scheme) -> Make:
        return lambda kept: StepGraph(quantize(exact, scheme, yardstick.calibration, kept), "int8", "cpu")

    passing = first_to_pass({scheme: made_by(scheme) for scheme in SCHEMES}, worst_first, yardstick, "CPU")
    return min(passing, key=lambda built: built.step_ms)


def cuda_int8(yardstick: Yardstick, fp16: onnx.ModelProto, worst_first: Sequence[LayerError]) -> Built:
    """Q/DQ on the linear layers, with the rule for activation ranges that agrees best; BundleError when none passes.

    Speed decides nothing here: this machine's says nothing about a GPU's.
    """
    ranges = activation_ranges(fp16, yardstick.calibration)

    def made_by(rule: Range) -> Make:
        return lambda kept: StepGraph(quantize_linears(fp16, ranges[rule], kept), "int8", "cuda")

    passing = first_to_pass({rule: made_by(rule) for rule in RANGES}, worst_first, yardstick, "CUDA")
    return max(passing, key=lambda built: built.parity.top1_agreement)


def build(wanted: Wanted, yardstick: Yardstick) -> tuple[list[StepGraph], list[Parity], str]:
    """The wanted graphs of a trained network.  → graphs, parity records, calibration record

    Raises BundleError when a graph misses the gate or breaks a rule of the lint.
    """
    model = yardstick.model
    top_k = min(TOP_K, model.config.vocab_size)
    fp16 = cuda_graph(model, wanted.fp32_norms)
    built: list[Built] = []
    graphs: list[StepGraph] = []
    worst_first: list[LayerError] = []
    if wanted.cpu_int8 or wanted.cuda_int8:
        worst_first = layer_errors(fp16, yardstick.calibration[::8])
    if wanted.cpu_int8:
        built.append(cpu_int8(yardstick, top_k, worst_first))
    if wanted.cpu_fp32:
        graphs.append(StepGraph(cpu_graph(model, top_k), "fp32", "cpu"))
    if wanted.cuda_fp16:
        built.append(held_to(yardstick, StepGraph(fp16, "fp16", "cuda"), FP16))
        if not passes(built[-1].parity):
            raise BundleError(f"the FP16 graph misses {GATE}; nothing was written")
    if wanted.cuda_int8:
        built.append(cuda_int8(yardstick, fp16, worst_first))
    graphs += [b.graph for b in built]
    check(graphs)
    return graphs, [b.parity for b in built], calibration_record(built, yardstick)


def calibration_record(built: Sequence[Built], yardstick: Yardstick) -> str:
    """Where the activation scales of each INT8 graph come from, in words."""
    sampled = f"{len(yardstick.calibration)} canvases of sampling trajectories, equally many of every mask rate"
    records = []
    for b in built:
        if b.graph.precision == "int8":
            source = "at run time, per pass" if b.parity.scheme == "dynamic" else f"{sampled}, {b.parity.scheme}"
            records.append(f"{b.graph.file}: {source}")
    return "; ".join(records) or "none"


def build_untrained(wanted: Wanted, model: Denoiser) -> list[StepGraph]:
    """The same graphs of random weights, which have no quality to keep: nothing is measured."""
    top_k = min(TOP_K, model.config.vocab_size)
    fp16 = cuda_graph(model, wanted.fp32_norms)
    graphs = []
    if wanted.cpu_int8:
        graphs.append(StepGraph(quantize(cpu_graph(model, top_k), "dynamic", []), "int8", "cpu"))
    if wanted.cpu_fp32:
        graphs.append(StepGraph(cpu_graph(model, top_k), "fp32", "cpu"))
    if wanted.cuda_fp16:
        graphs.append(StepGraph(fp16, "fp16", "cuda"))
    if wanted.cuda_int8:
        visited = trajectories(model, "linear", np.zeros((1, model.config.canvas_len), np.uint16), CALIBRATION_SEED)
        graphs.append(
            StepGraph(quantize_linears(fp16, activation_ranges(fp16, visited)["largest"], []), "int8", "cuda")
        )
    check(graphs)
    return graphs


def check(graphs: Sequence[StepGraph]) -> None:
    """Hold the CUDA graphs to the lint: BundleError with every violation, one line for each slow shape."""
    for graph in graphs:
        if graph.target == "cuda":
            if broken := violations(graph.model):
                raise BundleError(f"{graph.file} breaks the rules of CUDA graphs: {'; '.join(broken)}")
            for sentence in slow_shapes(graph.model):
                print(f"{graph.file}: {sentence}")
