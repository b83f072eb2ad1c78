"""Two implementations, one law: the torch network given a condition, and the graphs that ship."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from host.evaluate.scorers import session_of
from host.export.conditioned_graphs import (
    conditioned_prefill_graph,
    conditioned_step_graph,
    encode_image_graph,
    encode_text_graph,
    memory_graph,
)
from host.export.conditions_pipeline import untested_conditions
from host.export.random_weights import random_conditions
from host.export.row_ranges import best_ranges, observe
from host.model.conditions import Condition, Given, Memory
from host.model.layouts import causal, evidence
from host.model.network import NO_PADDING, Cache, Denoiser, config_named
from host.sampling.reference import guided
from host.train.objectives import Settings, ar

VOCAB, LENGTH, K, GUIDANCE, ROWS, SCORED = 120, 48, 20, 1.5, 9, 3
SHAPE = replace(config_named("debug"), vocab_size=VOCAB, canvas_len=LENGTH, time_input=False, conditions=True)
WORDS, PICTURES = random_conditions(VOCAB, 6, seed=1)[-2:]
ONE, TWO = (replace(PICTURES, pictures=PICTURES.pictures[:count]) for count in (1, 2))
CONDITIONS = {
    "words": WORDS,
    "a picture": ONE,
    "two pictures": TWO,
    "three pictures": PICTURES,
    "a word and a picture": replace(ONE, words=WORDS.words[1:2]),
    "words and two pictures": replace(TWO, words=WORDS.words[:2]),
    "words and three pictures": replace(PICTURES, words=WORDS.words),
}
Feed = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def model() -> Denoiser:
    torch.manual_seed(0)
    made = Denoiser(SHAPE).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def run(graph: onnx.ModelProto, feed: Feed) -> Feed:
    session = session_of(graph)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def remembered(graphs: Mapping[str, onnx.ModelProto], condition: Condition) -> Feed:
    """What blocks read of the memories of words and pictures, side by side."""
    given, parts = Given.of([condition]), list[np.ndarray[Any, Any]]()
    if condition.words:
        words = {name: getattr(given, name).numpy().astype(np.int32) for name in given._fields[:3]}
        parts.append(run(graphs["encode.text"], words)["memory"])
    if len(condition.pictures):
        parts.append(run(graphs["encode.image"], {"pixels": given.pixels.numpy()})["memory"])
    return run(graphs["encode.memory"], {"memory": np.concatenate(parts, 1)})


def float_graphs(model: Denoiser) -> dict[str, onnx.ModelProto]:
    """What makes a memory."""
    return {
        "encode.text": encode_text_graph(model),
        "encode.image": encode_image_graph(model),
        "encode.memory": memory_graph(model),
    }


def folded(model: Denoiser, memory: Memory, layer: int) -> Feed:
    """The weights of the queries and of the output multiplied into the network's keys and values."""
    assert model.conditions is not None
    read = model.conditions.reads[layer]
    heads, width = SHAPE.heads, SHAPE.d_model // SHAPE.heads
    queries = read.q.weight.view(heads, width, -1) / width**0.5  # type: ignore[operator, union-attr]
    shift = read.q.bias.view(heads, width) / width**0.5  # type: ignore[operator, union-attr]
    out = (read.out.weight + read.gain.diag()).view(-1, heads, width)  # type: ignore[operator, union-attr]
    keys, values = memory.keys[layer][0], memory.values[layer][0]
    added = 0 if memory.bias is None else memory.bias[0, 0]
    return {
        "keys": torch.einsum("hwd,hrw->dhr", queries, keys).flatten(1).numpy(),
        "bias": (torch.einsum("hw,hrw->hr", shift, keys) + added).flatten().numpy(),
        "values": torch.einsum("dhw,hrw->hrd", out, values).flatten(0, 1).numpy(),
    }


def step_feed(graph: onnx.ModelProto, tokens: torch.Tensor) -> Feed:
    """All rows in one pass behind nothing, the last of them scored."""
    empty = {
        value.name: np.zeros((1, SHAPE.heads, LENGTH, SHAPE.d_model // SHAPE.heads), np.float32)
        for value in graph.graph.input
        if value.name.removeprefix("plain_").startswith(("keys.", "values."))
    }
    places = np.arange(ROWS, dtype=np.int32)
    return empty | {
        "tokens": tokens.numpy().astype(np.int32),
        "positions": places[None],
        "key_positions": places,
        "last": np.array([ROWS - 1], np.int32),
        "total": np.array([ROWS], np.int32),
        "scored": places[-SCORED:],
    }


@torch.no_grad()
@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
def test_conditioned_graphs_are_the_network(model: Denoiser, condition: Condition) -> None:
    torch.manual_seed(1)
    tokens, close = torch.randint(4, VOCAB, (1, ROWS)), partial(np.testing.assert_allclose, atol=1e-4)
    memory = model.remember(Given.of([condition]))
    feed = remembered(float_graphs(model), condition)
    for i in range(SHAPE.layers):
        for kind, array in folded(model, memory, i).items():
            close(feed[f"memory_{kind}.{i}"], array)
    laws, states, caches = [], [], []
    for read in (memory, None):
        caches.append(Cache.empty(SHAPE))
        states.append(model(*causal(tokens), caches[-1], memory=read)[0, -SCORED:])
        laws.append(model.logits(states[-1], torch.full((SCORED,), NO_PADDING)).log_softmax(-1))
        caches[-1].keep(torch.arange(ROWS))
    for graph, law in (
        (conditioned_step_graph(model, K), laws[0]),
        (conditioned_step_graph(model, K, guided=True), guided(laws[0], laws[1], GUIDANCE, K)),
    ):
        is_guided = any(value.name == "guidance" for value in graph.graph.input)
        made = run(
            graph, step_feed(graph, tokens) | feed | ({"guidance": np.array(GUIDANCE, np.float32)} if is_guided else {})
        )
        expected = law.sort(descending=True, stable=True)
        best = torch.from_numpy(made["scores"]).sort(descending=True, stable=True)
        assert best.indices[:, :K].tolist() == expected.indices[:, :K].tolist()
        close(best.values[:, :K].log_softmax(-1), expected.values[:, :K].log_softmax(-1))
        close(made["states"], states[0])
        for prefix, cache in zip(("", "plain_"), caches[: 1 + is_guided], strict=False):
            for i in range(SHAPE.layers):
                close(made[f"new_{prefix}keys.{i}"][:, :, :ROWS], cache.keys[i])
                close(made[f"new_{prefix}values.{i}"][:, :, :ROWS], cache.values[i])


@torch.no_grad()
@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
def test_conditioned_prefill_graph_is_the_network(model: Denoiser, condition: Condition) -> None:
    places = [0, 1, 2, 6, 7]
    rows, cache = evidence([1, 9, 8, 7, 2], places, []), Cache.empty(SHAPE)
    model(*rows, cache, memory=model.remember(Given.of([condition])))
    memory = remembered(float_graphs(model), condition)
    graph = conditioned_prefill_graph(model)
    feed = {"tokens": rows.tokens.numpy().astype(np.int32), "positions": np.array([places], np.int32)}
    made = run(graph, feed | {name: memory[name] for name in memory if name in {v.name for v in graph.graph.input}})
    for i, (keys, values) in enumerate(cache.fresh):
        np.testing.assert_allclose(made[f"new_keys.{i}"], keys.numpy(), atol=1e-4)
        np.testing.assert_allclose(made[f"new_values.{i}"], values.numpy(), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS)
def test_conditioned_int8_graphs_are_near_the_network_and_a_row_is_the_same_in_any_pass(
    model: Denoiser, condition: Condition
) -> None:
    graphs = {str(graph.role): graph.model for graph in untested_conditions(model, {"ar"}, int8=True)}
    memory: Memory = model.remember(Given.of([condition]))
    feed = remembered(graphs, condition)
    exact = folded(model, memory, 0)
    for kind in ("key", "value"):
        assert feed[f"memory_{kind}s.0"].dtype == np.int8 and np.abs(feed[f"memory_{kind}s.0"]).max() == 63
        error = feed[f"memory_{kind}s.0"] * feed[f"memory_{kind}_scales.0"] - exact[f"{kind}s"]
        assert 0 < np.linalg.norm(error) < 0.15 * np.linalg.norm(exact[f"{kind}s"])
    torch.manual_seed(1)
    tokens = torch.randint(4, VOCAB, (1, ROWS))
    for role, more in (("step.conditioned", {}), ("step.guided", {"guidance": np.array(GUIDANCE, np.float32)})):
        whole = step_feed(graphs[role], tokens) | feed | more
        made = run(graphs[role], whole)
        part = whole | {name: whole[name][:, : ROWS - 1] for name in ("tokens", "positions")}
        part |= {"key_positions": whole["key_positions"][:-1], "scored": whole["scored"][:-1]}
        part |= {"last": np.array([ROWS - 2], np.int32), "total": np.array([ROWS - 1], np.int32)}
        fewer = run(graphs[role], part)
        assert np.array_equal(made["scores"][:-1], fewer["scores"])


@torch.no_grad()
def test_conditioned_layer_that_is_kept_in_float_reads_a_memory_in_float(model: Denoiser) -> None:
    torch.manual_seed(1)
    tokens = torch.randint(4, VOCAB, (1, ROWS))
    law = model.logits(
        model(*causal(tokens), Cache.empty(SHAPE), memory=model.remember(Given.of([WORDS])))[0, -SCORED:],
        torch.full((SCORED,), NO_PADDING),
    ).log_softmax(-1)
    rows = ar.examples(tokens, np.random.default_rng(0), Settings())
    everything = best_ranges(model, observe(model, [replace(row, condition=WORDS) for row in rows]))[0]
    for kept in ("conditions.reads.0.out", "blocks.0.qkv"):
        ranges = {name: both for name, both in everything.items() if name != kept}
        memory = remembered({**float_graphs(model), "encode.memory": memory_graph(model, ranges)}, WORDS)
        assert [memory[f"memory_keys.{i}"].dtype for i in range(SHAPE.layers)] == [np.float32, np.int8]
        graph = conditioned_step_graph(model, K, ranges)
        scores = torch.from_numpy(run(graph, step_feed(graph, tokens) | memory)["scores"])
        assert 0 < (scores.log_softmax(-1).exp() - law.exp()).abs().max() < 0.05
