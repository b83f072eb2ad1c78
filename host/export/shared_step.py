"""The graph of blocks that takes two rows of each of several requests, made of a step graph and a draft graph.

Products run over the rows of all requests, attention over those of each. With static scales, and at least two rows of
each, a row's scores are the same to the bit as in a pass of its request alone. B: requests, T: keys that a request's
rows see, V: vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from edge.decoding.together import REQUESTS, ROWS
from host.evaluate.scorers import session_of
from host.export.bundle_writer import BundleGraph
from host.export.graph_builder import GraphBuilder, Value
from host.export.shared_weights import LEAST_BYTES
from shared.errors import BundleError
from shared.tokens import FIRST_TEXT_ID

DRAFT: Final = "draft."
"""Prefix of the draft graph's names, some of which are the step graph's."""
SEEN: Final = ("seen_positions", "distance", "distance.column", "distance.pairs", "bias_of_pairs", "bias")
"""What a step graph makes of the one request's positions."""


def with_shared_step(graphs: list[BundleGraph]) -> list[BundleGraph]:
    """The graphs of blocks, and behind an INT8 step graph that has a drafter the one of several requests, its large
    constants left in these two's files. Raises BundleError when a row would not score the same in it.
    """
    by_role = {graph.role: graph for graph in graphs if (graph.target, graph.precision) == ("cpu", "int8")}
    if not {"step", "draft"} <= by_role.keys():
        return graphs
    step, draft = by_role["step"], by_role["draft"]
    shared = shared_step(step.model, draft.model)
    if (changed := rows_that_differ(step.model, shared)) > 0:
        raise BundleError(f"{changed} rows score otherwise in passes of several requests; nothing was written")
    shared = _without_constants(shared, (("", step), (DRAFT, draft)))
    return [*graphs, BundleGraph(shared, "step.shared", step.precision, step.target)]


def rows_that_differ(step: onnx.ModelProto, shared: onnx.ModelProto, passes: int = 8) -> int:
    """Of random rows behind random caches, those that do not score the same to the bit in both graphs."""
    rng, alone, together, differ = np.random.default_rng(0), session_of(step), session_of(shared), 0
    shapes = {i.name: i.shape for i in alone.get_inputs() if i.name.startswith(("keys.", "values."))}
    room = next(c.dims[0] for c in step.graph.initializer if c.name == "position_embedding.weight")
    vocab_size = alone.get_outputs()[0].shape[1]
    for _ in range(passes):
        feed, scores = dict[str, NDArray[Any]](), list[NDArray[np.float32]]()
        tokens = rng.integers(FIRST_TEXT_ID, vocab_size, (REQUESTS, 1, ROWS)).astype(np.int32)
        totals = rng.integers(ROWS + 1, room, REQUESTS)
        places = [np.arange(total - ROWS, total, dtype=np.int32)[None] for total in totals]
        for r, total in enumerate(totals.tolist()):
            own = {name: rng.normal(size=(1, h, room, d)).astype(np.float32) for name, (_, h, _, d) in shapes.items()}
            own |= {"last": np.array([total - 1], np.int32), "total": np.array([total], np.int32)}
            own["key_positions"] = np.arange(room, dtype=np.int32)
            feed |= {f"{name}.{r}": value for name, value in own.items()}
            given = {"tokens": tokens[r], "positions": places[r], "scored": np.arange(ROWS, dtype=np.int32)}
            scores += list(alone.run(["scores"], own | given)[0])
        feed |= {"tokens": tokens.reshape(1, -1), "positions": np.concatenate(places, 1)}
        feed["noise"] = np.zeros((REQUESTS, ROWS + 1, vocab_size), np.float32)
        feed["temperature"] = np.zeros((REQUESTS, 1, 1), np.float32)
        found = together.run(["scores"], feed)[0]
        differ += sum(not np.array_equal(a, b) for a, b in zip(scores, found, strict=True))
    return differ


def shared_step(step: onnx.ModelProto, draft: onnx.ModelProto) -> onnx.ModelProto:
    """tokens, positions int32 (1, 2·B): two rows of each request; noise float32 (B, 3, V), of the positions after its
    first row; temperature float32 (B, 1, 1); of each request r also key_positions.r, last.r, total.r, keys.i.r and
    values.i.r, as a step graph reads them → scores float32 (2·B, V); drafts int32 (2·B,): one for the position after
    the next of each row, where the best noisy score is drawn; new_keys.i.r, new_values.i.r.
    """
    g, requests = GraphBuilder(), range(REQUESTS)
    read: list[Value] = [(name, "int32", (1, ROWS * REQUESTS)) for name in ("tokens", "positions")]
    for r in requests:
        read += [
            (f"key_positions.{r}", "int32", ("places",)),
            (f"last.{r}", "int32", (1,)),
            (f"total.{r}", "int32", (1,)),
        ]
    vocab_size = int(_dims(next(value for value in step.graph.output if value.name == "scores"))[1])
    made: list[Value] = [("scores", "float32", (ROWS * REQUESTS, vocab_size))]
    for value in step.graph.input:
        if value.name.startswith(("keys.", "values.")):
            read += [(f"{value.name}.{r}", "float32", tuple(_dims(value))) for r in requests]
            made += [(f"new_{value.name}.{r}", "float32", tuple(_dims(value))) for r in requests]
    for node in step.graph.node:
        name = node.output[0]
        if node.op_type == "GroupQueryAttention":
            _attention(g, node)
        elif name == "bias":
            _seen_bias(g)
        elif name not in SEEN and not name.endswith(".scored"):  # as all rows are
            g.nodes.append(_renamed(node, {source: source.removesuffix(".scored") for source in node.input}))
    _constants(g, step)
    _drafts(g, draft, vocab_size)
    read += [("noise", "float32", (REQUESTS, ROWS + 1, vocab_size)), ("temperature", "float32", (REQUESTS, 1, 1))]
    return g.model(read, [*made, ("drafts", "int32", (ROWS * REQUESTS,))], contrib=True)


def _attention(g: GraphBuilder, node: onnx.NodeProto) -> None:
    """Of each request by itself, over its own cache."""
    (mixed, *_), attributes = node.output, {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    g.op("Split", f"{mixed}.qkv", node.input[0], outputs=REQUESTS, axis=1, num_outputs=REQUESTS)
    for r in range(REQUESTS):
        own = [f"{name}.{r}" if name else "" for name in node.input[1:]]
        outputs = [f"{name}.{r}" for name in node.output]
        g.fused("GroupQueryAttention", [f"{mixed}.qkv.{r}", *own], outputs, **attributes)
    g.op("Concat", mixed, *[f"{mixed}.{r}" for r in range(REQUESTS)], axis=1)


def _seen_bias(g: GraphBuilder) -> None:
    """By distance, of each request.  → bias.r (1, H, 2, T)"""
    ahead = g.op("Sub", "ahead", "farthest", "positions.column")
    g.op("Split", "ahead.of", ahead, outputs=REQUESTS, axis=0, num_outputs=REQUESTS)
    for r in range(REQUESTS):
        seen = g.op("Slice", f"seen_positions.{r}", f"key_positions.{r}", "first_row", f"total.{r}")
        pairs = g.op("Unsqueeze", f"pairs.{r}", g.op("Add", f"distance.{r}", seen, f"ahead.of.{r}"), "axis_0")
        columns = g.op("Gather", f"bias_of_pairs.{r}", "relative_bias.columns", pairs, axis=0)
        g.op("Transpose", f"bias.{r}", columns, perm=[0, 3, 1, 2])


def _drafts(g: GraphBuilder, draft: onnx.ModelProto, vocab_size: int) -> None:
    """The first step of the draft graph's chain, for every row: behind the best noisy score of its own."""
    names = {name: f"{DRAFT}{name}" for node in draft.graph.node for name in (*node.input, *node.output) if name}
    first = "drafter.depths.0"
    names |= {"state": "states", "token": "best", f"{first}.own_noise": f"{DRAFT}noise", "drafts": "drafts"}
    names["winners"] = names[f"{first}.winner"]
    noise, sides = g.op("Mul", "warm_noise", "noise", "temperature"), ("first", "last")
    for side, start in zip(sides, (0, 1), strict=True):
        ends = [g.constant(f"{side}.{end}", np.array([at])) for end, at in (("start", start), ("end", start + ROWS))]
        g.op("Slice", f"{side}_noise", noise, *ends, g.constant("axis_1", np.array([1])))
    rows = g.constant("all_rows", np.array([ROWS * REQUESTS, -1]))
    own = g.op("Reshape", "first_noise.rows", "first_noise", rows)
    g.op("ArgMax", "best", g.op("Add", "scores.noisy", "scores", own), axis=-1, keepdims=0)
    likely = g.op("Gather", "likely_noise", "last_noise", names["likely"], axis=2)
    g.op("Reshape", names[f"{first}.own_noise"], likely, rows)
    for node in draft.graph.node:
        made = node.output[0]
        if made == "drafts" or (made.startswith(first) and made != f"{first}.own_noise"):
            g.nodes.append(_renamed(node, names))
    _constants(g, draft, DRAFT)


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    copy.name = copy.output[0]
    return copy


def _constants(g: GraphBuilder, source: onnx.ModelProto, prefix: str = "") -> None:
    """Those that the nodes read."""
    read = {name for node in g.nodes for name in node.input}
    for constant in source.graph.initializer:
        if prefix + constant.name in read:
            g.constant(prefix + constant.name, numpy_helper.to_array(constant))


def _without_constants(model: onnx.ModelProto, origins: Sequence[tuple[str, BundleGraph]]) -> onnx.ModelProto:
    """Large constants become references into the files of the graphs that they were taken from.

    origins: a graph behind the prefix of its names.
    """
    lean = onnx.ModelProto()
    lean.CopyFrom(model)
    for prefix, graph in origins:
        content, names = graph.model.SerializeToString(), {c.name for c in graph.model.graph.initializer}
        for constant in lean.graph.initializer:
            name = constant.name.removeprefix(prefix)
            if not constant.name.startswith(prefix) or name not in names or len(constant.raw_data) < LEAST_BYTES:
                continue
            where = {
                "location": graph.file,
                "offset": content.index(constant.raw_data),
                "length": len(constant.raw_data),
            }
            constant.ClearField("raw_data")
            constant.data_location = TensorProto.EXTERNAL
            constant.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in where.items())
    return lean


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
