"""From a trained network to the graphs that ship: quantized, measured, and kept only when they pass the parity gate."""

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from host.evaluate.scorers import GraphScorer, session_of, step_feed
from host.export.blocks_pipeline import untested_blocks, untested_cuda_blocks
from host.export.bundle_writer import BundleGraph
from host.export.conditions_pipeline import untested_conditions
from host.export.cpu_graph import cpu_graph
from host.export.cpu_int8 import SCHEMES, Scheme, quantize
from host.export.cuda_graph import cuda_graph
from host.export.cuda_qdq import RANGES, Range, activation_ranges, quantize_linears
from host.export.lint import slow_shapes, violations
from host.export.parity import MAX_NELBO_CHANGE, MIN_TOP1_AGREEMENT, measure, nelbo_change, passes
from host.export.reference import CALIBRATION_SEED, Reference, trajectories
from host.export.stages import Stages
from host.model.network import Denoiser
from host.sampling.reference import TOP_K
from shared.errors import BundleError
from shared.manifest import Parity, Precision

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

    @property
    def cuda(self) -> tuple[Precision, ...]:
        """Precisions of the CUDA graphs."""
        wanted: dict[Precision, bool] = {"fp16": self.cuda_fp16, "int8": self.cuda_int8}
        return tuple(precision for precision, is_wanted in wanted.items() if is_wanted)


@dataclass(frozen=True)
class Built:
    """A graph that passed the gate."""

    graph: BundleGraph
    parity: Parity
    step_ms: float  # on this machine


def median_step_ms(graph: onnx.ModelProto, canvas: NDArray[np.int32]) -> float:
    """Median time of one denoising step of one canvas (L,) on this machine."""
    session = session_of(graph)
    feed = step_feed(session, canvas, 1.0)
    times = []
    for _ in range(25):
        started = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - started)
    return statistics.median(times[5:]) * 1e3


def measured(reference: Reference, graph: BundleGraph, scheme: str, kept_float: Sequence[str] = ()) -> Built:
    """Measure a graph's parity and speed, and print them."""
    parity = measure(reference, GraphScorer(graph.file, graph.model), scheme, kept_float)
    ms = median_step_ms(graph.model, reference.canvases[len(reference.canvases) // 2][0])
    verdict = "passes" if passes(parity) else "fails"
    figures = f"NELBO × {parity.nelbo_ratio:.4f}, top-1 agreement {parity.top1_agreement:.1%}, {ms:.1f} ms a step"
    kept = f", {len(kept_float)} layers in float" if kept_float else ""
    print(f"{graph.target} {graph.precision} {scheme}{kept}: {figures}: {verdict} the gate")
    return Built(graph, parity, ms)


Make = Callable[[Sequence[str]], BundleGraph]
"""Makes a quantized graph, given the layers to leave in float."""


def first_to_pass(reference: Reference, target: str, schemes: Mapping[str, Make]) -> list[Built]:
    """Quantize every layer by every scheme; while none passes the gate, leave 1, 2, 4 … of the worst layers in float.

    → those that pass; BundleError when none does with half of the layers in float
    """
    kept: list[str] = []
    while True:
        tried = [measured(reference, make(kept), scheme, kept) for scheme, make in schemes.items()]
        if passing := [built for built in tried if passes(built.parity)]:
            if kept:
                print(f"left in float: {', '.join(kept)}")
            return passing
        count = 2 * len(kept) or 1
        if count > len(reference.worst_first) // 2:
            raise BundleError(
                f"no INT8 scheme for {target} reaches {GATE}, even with half of the layers in float; nothing was "
                "written: train longer, or leave out --int8"
            )
        kept = [error.layer for error in reference.worst_first[:count]]


def cpu_int8(reference: Reference, top_k: int) -> Built:
    """The fastest of ONNX Runtime's schemes that pass the gate; BundleError when none does."""
    exact = cpu_graph(reference.model, top_k)

    def made_by(scheme: Scheme) -> Make:
        return lambda kept: BundleGraph(quantize(exact, scheme, reference.calibration, kept), "canvas", "int8", "cpu")

    passing = first_to_pass(reference, "CPU", {scheme: made_by(scheme) for scheme in SCHEMES})
    return min(passing, key=lambda built: built.step_ms)


def cuda_int8(reference: Reference, fp16: onnx.ModelProto) -> Built:
    """Q/DQ on the linear layers; BundleError when no rule for activation ranges passes.

    Speed decides nothing here: this machine's says nothing about a GPU's.
    """
    ranges = activation_ranges(fp16, reference.calibration)

    def made_by(rule: Range) -> Make:
        return lambda kept: BundleGraph(quantize_linears(fp16, ranges[rule], kept), "canvas", "int8", "cuda")

    return most_faithful(first_to_pass(reference, "CUDA", {rule: made_by(rule) for rule in RANGES}))


def most_faithful(passing: Sequence[Built]) -> Built:
    """Of graphs that pass the gate, the one whose NELBO changed least: top-1 agreement sees one token alone."""
    return min(passing, key=lambda built: nelbo_change(built.parity))


def build(wanted: Wanted, reference: Reference, stages: Stages) -> tuple[list[BundleGraph], list[Parity], str]:
    """The wanted canvas graphs of a trained network.  → graphs, parity records, calibration record

    Raises BundleError when a graph misses the gate or breaks a rule of the lint.
    """
    model = reference.model
    top_k = min(TOP_K, model.config.vocab_size)
    fp16 = cuda_graph(model, wanted.fp32_norms)
    built: list[Built] = []
    graphs: list[BundleGraph] = []
    if wanted.cpu_int8:
        stages.begin("INT8 for the CPU")
        built.append(cpu_int8(reference, top_k))
    if wanted.cpu_fp32:
        graphs.append(BundleGraph(cpu_graph(model, top_k), "canvas", "fp32", "cpu"))
    if wanted.cuda_fp16:
        stages.begin("FP16 for CUDA")
        built.append(measured(reference, BundleGraph(fp16, "canvas", "fp16", "cuda"), FP16))
        if not passes(built[-1].parity):
            raise BundleError(f"the FP16 graph misses {GATE}; nothing was written")
    if wanted.cuda_int8:
        stages.begin("INT8 for CUDA")
        built.append(cuda_int8(reference, fp16))
    graphs += [b.graph for b in built]
    check(graphs)
    return graphs, [b.parity for b in built], calibration_record(built, reference)


def calibration_record(built: Sequence[Built], reference: Reference) -> str:
    """Where the activation scales of each INT8 graph come from, in words."""
    sampled = f"{len(reference.calibration)} canvases of sampling trajectories, equally many of every mask rate"
    records = []
    for b in built:
        if b.graph.precision == "int8":
            source = "at run time, per pass" if b.parity.scheme == "dynamic" else f"{sampled}, {b.parity.scheme}"
            records.append(f"{b.graph.file}: {source}")
    return "; ".join(records) or "none"


def build_untrained(wanted: Wanted, model: Denoiser, learned: Collection[str]) -> list[BundleGraph]:
    """The same graphs of random weights, which have no quality to keep: nothing is measured."""
    top_k = min(TOP_K, model.config.vocab_size)
    fp16 = cuda_graph(model, wanted.fp32_norms)
    graphs = []
    if wanted.cpu_int8:
        graphs += untested_blocks(model, learned, int8=True)
        graphs += untested_conditions(model, learned, int8=True) if model.conditions is not None else []
        graphs.append(BundleGraph(quantize(cpu_graph(model, top_k), "dynamic", []), "canvas", "int8", "cpu"))
    if wanted.cpu_fp32:
        graphs += untested_blocks(model, learned, int8=False)
        graphs += untested_conditions(model, learned, int8=False) if model.conditions is not None else []
        graphs.append(BundleGraph(cpu_graph(model, top_k), "canvas", "fp32", "cpu"))
    graphs += untested_cuda_blocks(model, learned, wanted.cuda, wanted.fp32_norms)
    if wanted.cuda_fp16:
        graphs.append(BundleGraph(fp16, "canvas", "fp16", "cuda"))
    if wanted.cuda_int8:
        stories = np.zeros((1, model.config.canvas_len), np.uint16)
        visited = trajectories(model, stories, schedule="linear", seed=CALIBRATION_SEED)
        graphs.append(
            BundleGraph(
                quantize_linears(fp16, activation_ranges(fp16, visited)["largest"], []), "canvas", "int8", "cuda"
            )
        )
    check(graphs)
    return graphs


def check(graphs: Sequence[BundleGraph]) -> None:
    """Hold the CUDA graphs to the lint: BundleError with every violation, one line for each slow shape."""
    for graph in graphs:
        if graph.target == "cuda":
            if broken := violations(graph.model):
                raise BundleError(f"{graph.file} breaks the rules of CUDA graphs: {'; '.join(broken)}")
            for sentence in slow_shapes(graph.model):
                print(f"{graph.file}: {sentence}")
