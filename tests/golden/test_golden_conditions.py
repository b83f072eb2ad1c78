"""Two implementations, one law: the torch network given a condition, and the graphs that ship."""

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
)
from host.export.conditions_pipeline import untested_conditions
from host.export.random_weights import random_conditions
from host.model.conditions import Condition, Given, Memory
from host.model.layouts import causal, evidence
from host.model.network import NO_PADDING, Cache, Denoiser, config_named
from host.sampling.reference import guided

VOCAB, LENGTH, K, GUIDANCE, ROWS, SCORED = 120, 48, 20, 1.5, 9, 3
SHAPE = replace(config_named("debug"), vocab_size=VOCAB, canvas_len=LENGTH, time_input=False, conditions=True)
WORDS, PICTURES = random_conditions(VOCAB, 6, seed=1)[-2:]
CONDITIONS = [WORDS, PICTURES, replace(PICTURES, words=WORDS.words)]
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


def remembered(text: onnx.ModelProto, image: onnx.ModelProto, condition: Condition) -> Feed:
    """The memories of words and pictures, side by side."""
    given, parts = Given.of([condition]), list[Feed]()
    if condition.words:
        parts.append(run(text, {name: getattr(given, name).numpy().astype(np.int32) for name in given._fields[:3]}))
    if len(condition.pictures):
        parts.append(run(image, {"pixels": given.pixels.numpy()}))
    return {name: np.concatenate([part[name] for part in parts], 2) for name in parts[0]}


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
@pytest.mark.parametrize("condition", CONDITIONS, ids=["words", "pictures", "both"])
def test_conditioned_graphs_are_the_network(model: Denoiser, condition: Condition) -> None:
    torch.manual_seed(1)
    tokens, close = torch.randint(4, VOCAB, (1, ROWS)), partial(np.testing.assert_allclose, atol=1e-4)
    memory = model.remember(Given.of([condition]))
    feed = remembered(encode_text_graph(model), encode_image_graph(model), condition)
    for i in range(SHAPE.layers):
        close(feed[f"memory_keys.{i}"], memory.keys[i].numpy())
        close(feed[f"memory_values.{i}"], memory.values[i].numpy())
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
def test_conditioned_prefill_graph_is_the_network(model: Denoiser) -> None:
    places = [0, 1, 2, 6, 7]
    rows, cache = evidence([1, 9, 8, 7, 2], places, []), Cache.empty(SHAPE)
    model(*rows, cache, memory=model.remember(Given.of([CONDITIONS[2]])))
    memory = remembered(encode_text_graph(model), encode_image_graph(model), CONDITIONS[2])
    graph = conditioned_prefill_graph(model)
    feed = {"tokens": rows.tokens.numpy().astype(np.int32), "positions": np.array([places], np.int32)}
    made = run(graph, feed | {name: memory[name] for name in memory if name in {v.name for v in graph.graph.input}})
    for i, (keys, values) in enumerate(cache.fresh):
        np.testing.assert_allclose(made[f"new_keys.{i}"], keys.numpy(), atol=1e-4)
        np.testing.assert_allclose(made[f"new_values.{i}"], values.numpy(), atol=1e-4)


@torch.no_grad()
def test_conditioned_int8_graphs_are_near_the_network_and_a_row_is_the_same_in_any_pass(model: Denoiser) -> None:
    graphs = {str(graph.role): graph.model for graph in untested_conditions(model, {"ar"}, int8=True)}
    memory: Memory = model.remember(Given.of([WORDS]))
    feed = remembered(graphs["encode.text"], graphs["encode.image"], WORDS)
    error = np.abs(feed["memory_values.0"] - memory.values[0].numpy()).max()
    assert 0 < error < 0.15 * memory.values[0].abs().max()
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
