"""The graphs of blocks that ship, of what a network has learned: in INT8 only if its laws pass the gate."""

import statistics
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from host.evaluate.likelihood import HeldOut
from host.evaluate.scorers import session_of
from host.export.bundle_writer import BundleGraph
from host.export.law_parity import GATE, LawReference, measure_law, passes_law, row_graphs
from host.export.row_builder import Ranges
from host.export.row_ranges import best_ranges, calibration_rows, observe
from host.export.step_graph import draft_graph, prefill_graph, step_graph
from host.model.network import Denoiser
from shared.errors import BundleError
from shared.manifest import LawParity, Precision
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
    shape = (4, model.config.canvas_len)
    text = np.random.default_rng(0).integers(FIRST_TEXT_ID, model.config.vocab_size, shape, np.uint16)
    ranges = best_ranges(model, observe(model, calibration_rows(text, learned)))[0] if int8 else None
    return blocks_graphs(model, learned, ranges)


def blocks_int8(model: Denoiser, learned: Collection[str], *, held_out: HeldOut, text: NDArray[np.uint16]) -> Blocks:
    """INT8 graphs that pass the gate: while they miss it, 1, 2, 4 … of the worst layers are left in float32.

    text: stories (n, L), of which the first choose the scales. BundleError when half of the layers in float32 do not
    help.
    """
    exact, calibration = blocks_graphs(model, learned), text[:CALIBRATION_STORIES]
    print_speed(exact[0])
    few = replace(held_out, canvases=held_out.canvases[:PARITY_STORIES])
    reference = LawReference(row_graphs(exact), few, fills_gaps="infill" in learned)
    ranges, worst_first = best_ranges(model, observe(model, calibration_rows(calibration, learned)))
    kept: list[str] = []
    while True:
        chosen = {name: bounds for name, bounds in ranges.items() if name not in kept}
        graphs = blocks_graphs(model, learned, chosen)
        parity = measure_law(reference, graphs, SCHEME, kept)
        say(parity)
        if passes_law(parity):
            print_speed(graphs[0])
            record = f"{parity.graph}: {len(calibration)} stories of training, {SCHEME}"
            return Blocks(graphs, (parity,), record)
        count = 2 * len(kept) or 1
        if count > len(worst_first) // 2:
            raise BundleError(
                f"INT8 for blocks misses its gate ({GATE}), even with half of the layers in float32; nothing was "
                "written: train longer, or leave out --int8"
            )
        kept = worst_first[:count]


def say(parity: LawParity) -> None:
    """One line."""
    infilling = f", infilling × {parity.infilling_ratio:.4f}" if parity.infilling_ratio else ""
    kept = f", in float32 {', '.join(parity.kept_float)}" if parity.kept_float else ""
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
