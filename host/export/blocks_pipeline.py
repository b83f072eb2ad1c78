"""The graphs of blocks that ship, of what a network has learned: in INT8 and FP16 only if its laws pass the gate."""

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from numpy.typing import NDArray

from host.evaluate.likelihood import HeldOut
from host.evaluate.scorers import session_of
from host.export.bundle_writer import BundleGraph
from host.export.cuda_memory import cuda_encode_image_graph, cuda_encode_text_graph
from host.export.cuda_qdq import linear_layers, quantize_linears
from host.export.cuda_step import DRAFTER, cuda_step_graph
from host.export.law_parity import GATE, LawReference, measure_law, passes_law, row_graphs
from host.export.random_weights import random_conditions
from host.export.row_builder import Ranges
from host.export.row_ranges import best_ranges, calibration_rows, observe
from host.export.step_graph import draft_graph, prefill_graph, step_graph
from host.model.network import Denoiser
from shared.errors import BundleError
from shared.manifest import LawParity, Precision, Role
from shared.tokens import FIRST_TEXT_ID

TEXT_STORIES: Final = 4096
CALIBRATION_STORIES: Final = 64
PARITY_STORIES: Final = 64
SCHEME: Final = "static, least squares"
PASS_ROWS: Final = (1, 4, 16)
PASS_CACHE: Final = 128


@dataclass(frozen=True)
class Blocks:
    """Graphs of blocks; parity and the source of the activation scales in INT8."""

    graphs: list[BundleGraph]
    parity: tuple[LawParity, ...] = ()
    calibration: str = ""


def blocks_graphs(model: Denoiser, learned: Collection[str], ranges: Ranges | None = None) -> list[BundleGraph]:
    """None without the objective ar; prefill with infill, draft with a drafter. ranges: for INT8."""
    if "ar" not in learned:
        return []
    precision: Precision = "fp32" if ranges is None else "int8"
    step = step_graph(model, ranges)
    graphs = [BundleGraph(step, "step", precision, "cpu")]
    if "infill" in learned:
        graphs.append(BundleGraph(prefill_graph(model, ranges), "prefill", precision, "cpu"))
    if model.drafter is not None:
        draft = draft_graph(model, None if ranges is None else "dynamic")
        graphs.append(BundleGraph(draft, "draft", precision, "cpu"))
    return graphs


def untested_blocks(model: Denoiser, learned: Collection[str], int8: bool) -> list[BundleGraph]:
    """Graphs of random weights: scales and frequent tokens of random text, nothing measured."""
    text = _random_text(model)
    ranges = best_ranges(model, observe(model, calibration_rows(text, learned)))[0] if int8 else None
    return blocks_graphs(model, learned, ranges)


def untested_cuda_blocks(
    model: Denoiser, learned: Collection[str], precisions: Collection[Precision], fp32_norms: bool
) -> list[BundleGraph]:
    """The same for CUDA."""
    rows = calibration_rows(_random_text(model), learned)
    if model.conditions is not None:
        some = random_conditions(model.config.vocab_size, len(rows))
        rows += [replace(row, condition=one) for row, one in zip(rows, some, strict=True)]
    ranges = best_ranges(model, observe(model, rows))[0] if "int8" in precisions else {}
    exact = _exact_cuda(model, fp32_norms)
    return [one for precision in precisions for one in _in_precision(exact, ranges if precision == "int8" else None)]


def _random_text(model: Denoiser) -> NDArray[np.uint16]:
    shape = (4, model.config.canvas_len)
    return np.random.default_rng(0).integers(FIRST_TEXT_ID, model.config.vocab_size, shape, np.uint16)


def _exact_cuda(model: Denoiser, fp32_norms: bool) -> dict[Role, onnx.ModelProto]:
    """The step graph in FP16, and encoders of conditions where the network takes any."""
    graphs: dict[Role, onnx.ModelProto] = {"step": cuda_step_graph(model, fp32_norms)}
    if model.conditions is not None:
        graphs["encode.text"] = cuda_encode_text_graph(model, fp32_norms)
        graphs["encode.image"] = cuda_encode_image_graph(model, fp32_norms)
    return graphs


def _in_precision(exact: Mapping[Role, onnx.ModelProto], ranges: Ranges | None) -> list[BundleGraph]:
    """In FP16, or with Q/DQ around the layers that have a range."""
    if ranges is None:
        return [BundleGraph(graph, role, "fp16", "cuda") for role, graph in exact.items()]
    return [BundleGraph(_quantized(graph, ranges), role, "int8", "cuda") for role, graph in exact.items()]


def _quantized(graph: onnx.ModelProto, ranges: Ranges) -> onnx.ModelProto:
    """Symmetric: a range is its larger side, and that of the first layer that reads a value."""
    layers = {node.name: node.inputs[0].name for node in linear_layers(gs.import_onnx(graph))}
    largest, kept = dict[str, float](), []
    for name, value in layers.items():
        layer = name.removesuffix(".matmul").removesuffix(".out")
        if layer in ranges:
            largest.setdefault(value, max(map(abs, ranges[layer])))
        else:
            kept.append(name)
    quantized = quantize_linears(graph, largest, kept)  # which drops constants that no node reads
    quantized.graph.initializer.extend(c for c in graph.graph.initializer if c.name.startswith(DRAFTER))
    return quantized


def law_reference(
    model: Denoiser, learned: Collection[str], held_out: HeldOut, text: NDArray[np.uint16]
) -> LawReference:
    """What other graphs of blocks are compared with, in float32; the first stories (n, L) of `text` choose scales."""
    return LawReference(
        model=model,
        learned=learned,
        graphs=row_graphs(blocks_graphs(model, learned)),
        few=replace(held_out, canvases=held_out.canvases[:PARITY_STORIES]),
        text=text[:CALIBRATION_STORIES],
    )


def blocks_int8(reference: LawReference) -> Blocks:
    """INT8 graphs for the CPU that pass the gate. Raises BundleError; see `_first_to_pass`."""
    model, learned = reference.model, reference.learned
    print_speed(blocks_graphs(model, learned)[0])
    blocks = _first_to_pass(reference, lambda ranges: blocks_graphs(model, learned, ranges), reference.ranges)
    print_speed(blocks.graphs[0])
    return blocks


def cuda_blocks(reference: LawReference, precisions: Collection[Precision], fp32_norms: bool) -> list[Blocks]:
    """The step graph for CUDA in each precision, and its encoders, held to the same gate. Raises BundleError."""
    exact, built = _exact_cuda(reference.model, fp32_norms), []
    if "fp16" in precisions:
        graphs = _in_precision(exact, None)
        parity = measure_law(reference, graphs, "half precision")
        say(parity)
        if not passes_law(parity):
            raise BundleError(f"the FP16 step graph misses its gate ({GATE}); nothing was written")
        built.append(Blocks(graphs, (parity,)))
    if "int8" in precisions:
        built.append(_first_to_pass(reference, lambda ranges: _in_precision(exact, ranges), reference.cuda_ranges))
    return built


def _first_to_pass(
    reference: LawReference, make: Callable[[Ranges], list[BundleGraph]], chosen: tuple[Ranges, list[str]]
) -> Blocks:
    """While the gate is missed, leave 1, 2, 4 … of the worst layers in float. BundleError when half do not help."""
    ranges, worst_first = chosen
    kept: list[str] = []
    while True:
        graphs = make({name: bounds for name, bounds in ranges.items() if name not in kept})
        parity = measure_law(reference, graphs, SCHEME, kept)
        say(parity)
        if passes_law(parity):
            return Blocks(graphs, (parity,), f"{parity.graph}: {len(reference.text)} stories of training, {SCHEME}")
        count = 2 * len(kept) or 1
        if count > len(worst_first) // 2:
            raise BundleError(
                f"INT8 for blocks misses its gate ({GATE}), even with half of the layers in float; nothing was "
                "written: train longer, or leave out --int8"
            )
        kept = worst_first[:count]


def say(parity: LawParity) -> None:
    """One line."""
    infilling = f", infilling × {parity.infilling_ratio:.4f}" if parity.infilling_ratio else ""
    if parity.conditioned_ratio is not None:
        infilling += f", given a condition × {parity.conditioned_ratio:.4f}, memory off by {parity.memory_error:.2%}"
    kept = f", in float {', '.join(parity.kept_float)}" if parity.kept_float else ""
    verdict = "passes" if passes_law(parity) else "fails"
    print(
        f"{parity.graph} {parity.scheme}{kept}: left to right × {parity.law_ratio:.4f}{infilling}, "
        f"{parity.texts_agreeing:.0%} of greedy texts the same: {verdict} the gate"
    )


def print_speed(step: BundleGraph) -> None:
    """Of passes on this machine."""
    times = ", ".join(f"{rows} row{'s' * (rows > 1)} {pass_ms(step.model, rows):.2f}" for rows in PASS_ROWS)
    print(f"{step.file}: median ms of a pass behind {PASS_CACHE} cached rows: {times}")


def pass_ms(step: onnx.ModelProto, rows: int) -> float:
    """Median time of a pass of `rows` rows, all scored, over a cache of PASS_CACHE rows that is written in place."""
    session, total = session_of(step), PASS_CACHE + rows
    feed = {
        "tokens": np.zeros((1, rows), np.int32),
        "positions": np.arange(PASS_CACHE, total, dtype=np.int32)[None],
        "key_positions": np.arange(total, dtype=np.int32),
        "last": np.array([total - 1], np.int32),
        "total": np.array([total], np.int32),
        "scored": np.arange(rows, dtype=np.int32),
    }
    binding = session.io_binding()
    for value in session.get_inputs():
        if value.name in feed:
            binding.bind_cpu_input(value.name, feed[value.name])
        else:
            shape = [1, value.shape[1], total, value.shape[3]]
            cache = ort.OrtValue.ortvalue_from_numpy(np.ones(shape, np.float32))
            binding.bind_ortvalue_input(value.name, cache)
            binding.bind_ortvalue_output(f"new_{value.name}", cache)
    for name in ("scores", "states"):
        binding.bind_output(name)
    times = []
    for _ in range(60):
        started = time.perf_counter()
        session.run_with_iobinding(binding)
        times.append(time.perf_counter() - started)
    return statistics.median(times[10:]) * 1e3
