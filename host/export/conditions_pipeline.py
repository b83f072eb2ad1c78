"""The graphs of conditions that ship: in INT8 only if the law given a condition passes the gate."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import onnx
import torch

from host.data.shards import Split
from host.evaluate.bundle_conditions import told_by_bundle
from host.evaluate.conditions import conditional_laws, print_laws_given
from host.evaluate.likelihood import HeldOut
from host.evaluate.row_graphs import RowGraphs
from host.export.blocks_pipeline import CALIBRATION_STORIES, PARITY_STORIES, SCHEME, Blocks, say
from host.export.bundle_writer import BundleGraph
from host.export.conditioned_graphs import (
    conditioned_prefill_graph,
    conditioned_step_graph,
    encode_image_graph,
    encode_text_graph,
    memory_graph,
)
from host.export.law_parity import GATE, LawReference, agreeing, passes_law, read, total_nats
from host.export.random_weights import random_conditions
from host.export.row_builder import Ranges
from host.export.row_ranges import best_ranges, calibration_rows, observe
from host.model.conditions import PICTURE_ROWS, PICTURE_SIZE, PICTURES, WORD_TOKENS, WORDS
from host.model.network import Denoiser
from host.sampling.reference import TOP_K
from host.train.conditioner import Conditioner
from host.train.objectives import Example, Settings, ar, conditioned
from shared.conditions import Conditions
from shared.errors import BundleError
from shared.manifest import LawParity, Precision, Role
from shared.tokens import FIRST_TEXT_ID

PROMPT_TOKENS: Final = 4
MEASURED_STORIES: Final = 128
MEASURED_TEXTS: Final = 200
SINGLE: Final = (1,)  # word or picture


def conditions_spec(guidance: float = 0.0) -> Conditions:
    """What a bundle's manifest says of conditions, without figures."""
    return Conditions(
        words=WORDS,
        word_tokens=WORD_TOKENS,
        pictures=PICTURES,
        picture_size=PICTURE_SIZE,
        picture_rows=PICTURE_ROWS,
        guidance=guidance,
    )


def conditioned_graphs(model: Denoiser, learned: Collection[str], ranges: Ranges | None = None) -> list[BundleGraph]:
    """Encoders and step graphs; prefill with infill. ranges: for INT8."""
    precision: Precision = "fp32" if ranges is None else "int8"
    top_k = min(TOP_K, model.config.vocab_size)
    graphs: dict[Role, onnx.ModelProto] = {
        "encode.text": encode_text_graph(model, ranges),
        "encode.image": encode_image_graph(model, ranges),
        "encode.memory": memory_graph(model, ranges),
        "step.conditioned": conditioned_step_graph(model, top_k, ranges),
        "step.guided": conditioned_step_graph(model, top_k, ranges, guided=True),
    }
    if "infill" in learned:
        graphs["prefill.conditioned"] = conditioned_prefill_graph(model, ranges)
    return [BundleGraph(graph, role, precision, "cpu") for role, graph in graphs.items()]


def conditions_of_run(
    model: Denoiser, learned: Collection[str], *, conditioner: Conditioner, train: Split, held_out: HeldOut, int8: bool
) -> Blocks:
    """The graphs of a run; in INT8 such as pass the gate on the first held-out stories that have a condition."""
    if not int8:
        return Blocks(conditioned_graphs(model, learned))
    rng, settings = np.random.default_rng(0), Settings(conditioner=conditioner)
    few, stories = (
        torch.from_numpy(canvases.astype(np.int64))
        for canvases in (held_out.canvases[:PARITY_STORIES], train.first(CALIBRATION_STORIES))
    )
    calibration = calibration_rows(stories.numpy().astype(np.uint16), learned)
    calibration += conditioned.examples(stories, rng, settings) + conditioned.examples(stories, rng, settings)
    return conditions_int8(model, learned, held_out=conditioned.examples(few, rng, settings), calibration=calibration)


def reference_given(reference: LawReference, *, conditioner: Conditioner, train: Split) -> LawReference:
    """A reference that also measures graphs for CUDA given conditions, on the same held-out stories."""
    rng, settings = np.random.default_rng(0), Settings(conditioner=conditioner)
    few, stories = (
        torch.from_numpy(canvases.astype(np.int64))
        for canvases in (reference.few.canvases, train.first(CALIBRATION_STORIES))
    )
    return replace(
        reference,
        conditioned=_row_graphs(conditioned_graphs(reference.model, reference.learned)),
        given=conditioned.examples(few, rng, settings),
        calibration=conditioned.examples(stories, rng, settings) + conditioned.examples(stories, rng, settings),
    )


def measured_conditions(
    model: Denoiser, *, conditioner: Conditioner, held_out: HeldOut, guidance: float, bundle: Path
) -> Conditions:
    """What a bundle's manifest says of single words and pictures: of texts by its graphs, and of laws in float32."""
    few = replace(held_out, canvases=held_out.canvases[:MEASURED_STORIES])
    laws = conditional_laws(model, conditioner, few, SINGLE)
    print_laws_given(laws)
    told = told_by_bundle(
        bundle, conditioner, held_out=held_out, count=MEASURED_TEXTS, guidances=(guidance,), numbers=SINGLE
    )
    spec = conditions_spec(guidance)
    return msgspec.structs.replace(spec, asked_for=tuple(one.asked for one in told), laws=tuple(laws))


def untested_conditions(model: Denoiser, learned: Collection[str], int8: bool) -> list[BundleGraph]:
    """Graphs of random weights: scales of random text and conditions, nothing measured."""
    if not int8:
        return conditioned_graphs(model, learned)
    shape = (8, model.config.canvas_len)
    text = np.random.default_rng(0).integers(FIRST_TEXT_ID, model.config.vocab_size, shape)
    rows = ar.examples(torch.from_numpy(text), np.random.default_rng(0), Settings())
    conditions = random_conditions(model.config.vocab_size, len(rows))
    rows += [replace(row, condition=one) for row, one in zip(rows, conditions, strict=True)]
    return conditioned_graphs(model, learned, best_ranges(model, observe(model, rows))[0])


def conditions_int8(
    model: Denoiser, learned: Collection[str], *, held_out: Sequence[Example], calibration: Sequence[Example]
) -> Blocks:
    """INT8 graphs that pass the gate, as `host.export.blocks_pipeline.blocks_int8` makes those of blocks.

    held_out: stories left to right, each with a condition, of which the law is measured; calibration: of training, some
    with a condition and some without, which choose the scales.
    """
    exact = _row_graphs(conditioned_graphs(model, learned))
    nats, texts = total_nats(exact, held_out), _greedy(exact, held_out)
    ranges, worst_first = best_ranges(model, observe(model, calibration))
    kept: list[str] = []
    while True:
        graphs = conditioned_graphs(model, learned, {name: ranges[name] for name in ranges if name not in kept})
        measured = _row_graphs(graphs)
        parity = LawParity(
            graph=next(graph.file for graph in graphs if graph.role == "step.conditioned"),
            scheme=SCHEME,
            law_ratio=total_nats(measured, held_out) / nats,
            infilling_ratio=None,
            texts_agreeing=agreeing(measured, texts, PROMPT_TOKENS),
            kept_float=tuple(kept),
        )
        say(parity)
        if passes_law(parity):
            record = f"{parity.graph}: {len(calibration)} stories of training with and without conditions, {SCHEME}"
            return Blocks(graphs, (parity,), record)
        count = 2 * len(kept) or 1
        if count > len(worst_first) // 2:
            raise BundleError(f"INT8 for conditions misses its gate ({GATE}); nothing was written: leave out --int8")
        kept = worst_first[:count]


def _row_graphs(graphs: Sequence[BundleGraph]) -> RowGraphs:
    by_role = {graph.role: graph.model for graph in graphs}
    encoders = {role: by_role[role] for role in ("encode.text", "encode.image", "encode.memory")}
    return RowGraphs(by_role["step.conditioned"], encoders=encoders)


def _greedy(graphs: RowGraphs, held_out: Sequence[Example]) -> list[Example]:
    """What graphs write after the first tokens of each story, given its condition."""
    beginnings = [(one.rows.tokens[0, :PROMPT_TOKENS].tolist(), one) for one in held_out]
    return [
        read(graphs.greedy(first, one.rows.tokens.shape[1], one.condition), one.condition) for first, one in beginnings
    ]
