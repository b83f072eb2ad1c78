"""The graphs of blocks compute what the network computes, in any division into passes."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from host.evaluate.row_graphs import RowGraphs
from host.export.graph_builder import NEVER
from host.export.random_weights import untrained
from host.export.step_graph import draft_graph, prefill_graph, step_graph
from host.model.layouts import Gap, causal, evidence
from host.model.network import CONFIGS, NO_PADDING, Denoiser
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD

CONFIG = replace(CONFIGS["debug"], draft_depth=3, time_input=False)
MODEL: Denoiser = untrained(CONFIG)[0]
TOLERANCE = 1e-4
ROOM = 96


def session(graph: Any) -> ort.InferenceSession:
    return ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])


def tokens_of(n: int, seed: int = 0) -> list[int]:
    return [BOS, *np.random.default_rng(seed).integers(FIRST_TEXT_ID, CONFIG.vocab_size, n - 1).tolist()]


@torch.no_grad()
def expected(rows: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """States (N, D) and scores (N, V) of all rows, by the network."""
    states = MODEL(*rows)[0]
    return states.numpy(), MODEL.logits(states, torch.full((len(states),), NO_PADDING)).clamp(min=NEVER).numpy()


class InPlace:
    """The step graph as the edge runs it: each cache is one piece of memory, input and output at once."""

    def __init__(self, room: int) -> None:
        self.session = session(step_graph(MODEL))
        heads = CONFIG.heads
        self.positions: list[int] = []
        shape = (1, heads, room, CONFIG.d_model // heads)
        names = [f"{kind}.{i}" for i in range(CONFIG.layers) for kind in ("keys", "values")]
        self.caches = {name: ort.OrtValue.ortvalue_from_numpy(np.full(shape, np.nan, np.float32)) for name in names}

    def run(self, tokens: list[int], positions: list[int], scored: list[int]) -> list[NDArray[Any]]:
        """→ scores, states"""
        total = len(self.positions) + len(tokens)
        feed = {
            "tokens": np.array([tokens], np.int32),
            "positions": np.array([positions], np.int32),
            "key_positions": np.array([*self.positions, *positions], np.int32),
            "last": np.array([total - 1], np.int32),
            "total": np.array([total], np.int32),
            "scored": np.array(scored, np.int32),
        }
        binding = self.session.io_binding()
        for name, value in feed.items():
            binding.bind_cpu_input(name, value)
        for name in ("scores", "states"):
            binding.bind_output(name)
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(f"new_{name}", cache)
        self.session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()[:2]]

    def keep(self, positions: list[int]) -> None:
        self.positions += positions


@pytest.mark.parametrize("room", [61, 96, 256])
def test_step_graph_in_passes_with_rejected_rows_is_one_pass(room: int) -> None:
    """Some rows of each pass are taken back, and the next pass writes over them."""
    tokens = tokens_of(60)
    states, logits = expected(causal(torch.tensor([tokens])))
    graph, at = InPlace(room), 0
    memory = graph.caches["keys.0"].data_ptr()
    for kept, rejected in ((20, 0), (1, 3), (2, 2), (4, 0), (1, 0), (16, 9), (1, 3), (15, 1)):
        rows = list(range(at, at + kept))
        drafts = tokens_of(rejected + 1, seed=at)[1:]
        scored = list(range(kept + rejected))[:: 1 if kept < 10 else 3]
        scores, found = graph.run(tokens[at : at + kept] + drafts, list(range(at, at + kept + rejected)), scored)
        graph.keep(rows)
        for place, row in enumerate(scored):
            if row < kept:
                text = np.s_[FIRST_TEXT_ID:]  # the rest is NEVER plus what the head says
                np.testing.assert_allclose(scores[place, text], logits[at + row, text], atol=TOLERANCE, rtol=0)
                np.testing.assert_allclose(found[place], states[at + row], atol=TOLERANCE, rtol=0)
        at += kept
    assert at == len(tokens)
    assert graph.caches["keys.0"].data_ptr() == memory
    assert np.isnan(graph.caches["keys.0"].numpy()[:, :, at + 1 :]).all(), "only rows of a pass are written"


def test_step_graph_never_scores_padding_bos_or_mask() -> None:
    graph = InPlace(ROOM)
    scores, _ = graph.run(tokens_of(5), list(range(5)), [0, 4])
    for row in scores:
        assert set(np.flatnonzero(row < NEVER / 2).tolist()) == {PAD, BOS, MASK}, "and EOS may be drawn"


@pytest.mark.parametrize("passes", [[22], [1, 5, 16], [1] * 22], ids=["one pass", "three passes", "row by row"])
def test_step_graph_after_prefill_is_the_evidence_layout(passes: list[int]) -> None:
    text = tokens_of(40)
    given, positions = text[:20] + text[30:34], [*range(20), *range(34, 38)]
    rows = evidence(given, positions, [Gap(text[19], 20, text[20:30]), Gap(text[33], 38, tokens_of(11, 3)[1:])])
    _, logits = expected(rows)
    graphs = RowGraphs(step_graph(MODEL), prefill_graph(MODEL))
    cache = graphs.empty(ROOM)
    graphs.read_evidence(cache, given, positions)
    at, found = len(given), []
    for n in passes:
        here = slice(at, at + n)
        row_tokens, row_positions = (part[0, here].tolist() for part in rows[:2])
        found.append(graphs.append(cache, row_tokens, row_positions, list(range(n)))[0])
        at += n
    assert at == rows.tokens.shape[1]
    scores = np.maximum(np.concatenate(found), -100)  # NEVER plus what the head says
    np.testing.assert_allclose(scores, np.maximum(logits[len(given) :], -100), atol=TOLERANCE, rtol=0)


@torch.no_grad()
def chain(state: torch.Tensor, token: int, *, noise: torch.Tensor, temperature: float) -> list[int]:
    """The chain's drafts: each the likeliest of the likely tokens, noise added."""
    assert MODEL.drafter is not None
    drafts: list[int] = []
    for depth, step in enumerate(MODEL.drafter.depths):
        state = step(state, MODEL.token_embedding(torch.tensor([token])))
        scores = MODEL.draft_logits(state, torch.tensor([NO_PADDING]))[0]
        token = int((scores + temperature * noise[depth]).argmax())
        drafts.append(token)
    return drafts


@pytest.mark.parametrize("likely", [np.arange(CONFIG.vocab_size), np.arange(EOS, CONFIG.vocab_size, 3)], ids=len)
@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.3])
def test_draft_graph_draws_the_drafts_of_the_chain(
    temperature: float, likely: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MODEL.drafter is not None
    monkeypatch.setitem(MODEL.drafter._buffers, "likely", torch.from_numpy(likely))
    graph, rng = session(draft_graph(MODEL)), np.random.default_rng(1)
    for token in range(EOS, EOS + 60):
        state = rng.normal(size=(1, CONFIG.d_model)).astype(np.float32)
        noise = rng.gumbel(size=(CONFIG.draft_depth, CONFIG.vocab_size)).astype(np.float32)
        feed = {
            "state": state,
            "token": np.array([token], np.int32),
            "noise": noise,
            "temperature": np.array(temperature, np.float32),
        }
        (drafts,) = graph.run(None, feed)
        assert drafts.dtype == np.int32
        wanted = chain(torch.from_numpy(state), token, noise=torch.from_numpy(noise), temperature=temperature)
        assert drafts.tolist() == wanted
