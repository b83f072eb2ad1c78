"""Conditions: rows without a memory are scored as before, and a memory says what its text was given, no more."""

from dataclasses import replace

import pytest
import torch

from host.model.conditions import MERGED, PICTURE_GRID, PICTURE_ROWS, PICTURE_SIZE, Condition, Given, Memory
from host.model.layouts import causal
from host.model.network import NO_PADDING, Cache, Denoiser, config_named
from host.sampling.blocks import write
from host.sampling.many import sample_autoregressive
from host.sampling.reference import Settings, guided
from shared.tokens import EOS, PAD

VOCAB, LENGTH = 64, 40
SHAPE = replace(config_named("debug"), vocab_size=VOCAB, canvas_len=LENGTH, time_input=False, conditions=True)
PICTURE = torch.linspace(0, 1, 3 * PICTURE_SIZE**2).view(1, 3, PICTURE_SIZE, PICTURE_SIZE)
WORDS = Condition([[7], [8, 9]])
BOTH = Condition([[10]], torch.cat([PICTURE, 1 - PICTURE]))
PICTURES = Condition(pictures=PICTURE)


def network(spread: float = 0.1) -> Denoiser:
    torch.manual_seed(3)
    model = Denoiser(SHAPE).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn_like(p))
        model.head.bias[EOS] -= 2.0
    return model


def rows(texts: int = 1) -> torch.Tensor:
    torch.manual_seed(4)
    return torch.randint(4, VOCAB, (texts, 12))


@torch.no_grad()
def test_conditions_absent_or_silent_change_no_bit() -> None:
    model, tokens = network(), rows(3)
    plain = Denoiser(replace(SHAPE, conditions=False)).eval()
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if not n.startswith("conditions.")})
    expected = plain(*causal(tokens))
    assert torch.equal(model(*causal(tokens)), expected)
    memory = model.remember(Given.of([WORDS, BOTH, PICTURES]))
    assert not torch.equal(model(*causal(tokens), memory=memory), expected)
    assert model.conditions is not None
    model.conditions.start_silent()
    assert torch.equal(model(*causal(tokens), memory=memory), expected)
    silent = Denoiser(SHAPE)
    assert all(not p.any() for n, p in silent.named_parameters() if n.startswith("conditions.") and ".out." in n)


@torch.no_grad()
def test_conditions_of_a_text_do_not_depend_on_the_batch() -> None:
    model, conditions = network(), [WORDS, BOTH, PICTURES, Condition([[11]])]
    tokens = rows(len(conditions))
    together = model(*causal(tokens), memory=model.remember(Given.of(conditions)))
    for i, one in enumerate(conditions):
        alone = model(*causal(tokens[i : i + 1]), memory=model.remember(Given.of([one])))
        assert torch.allclose(together[i], alone[0], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("one", "other"), [(WORDS, Condition([[8, 9], [7]])), (PICTURES, BOTH), (WORDS, PICTURES)])
def test_conditions_that_differ_are_read_apart(one: Condition, other: Condition) -> None:
    model, tokens = network(), rows()
    first, second = (model(*causal(tokens), memory=model.remember(Given.of([given]))) for given in (one, other))
    assert not torch.allclose(first, second, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("words", [[], [[10], [8, 9]]], ids=["alone", "beside words"])
def test_conditions_read_merged_rows_of_a_picture_as_so_many_copies(words: list[list[int]]) -> None:
    model, tokens = network(), rows()
    parts = model.conditions
    assert parts is not None
    given = Given.of([Condition(words, PICTURE)])
    copies = torch.randn(1, PICTURE_ROWS, SHAPE.d_model).repeat_interleave(MERGED, 1)
    assert copies.shape == parts.pictures(PICTURE).shape == (1, PICTURE_GRID, SHAPE.d_model)
    parts.pictures.register_forward_hook(lambda *_: copies)
    beside = parts.encode(Given.of([Condition(words)]), model.word_rows(given.tokens))[0] if words else copies[:, :0]
    pairs = [read.remembered(torch.cat([beside, copies], 1)) for read in parts.reads]  # type: ignore[operator]
    whole = Memory([keys for keys, _ in pairs], [values for _, values in pairs], None)
    memory = model.remember(given)
    assert memory.keys[0].shape[2] == beside.shape[1] + PICTURE_ROWS
    assert torch.allclose(model(*causal(tokens), memory=memory), model(*causal(tokens), memory=whole), atol=1e-5)


def test_conditions_get_gradients_from_a_frozen_body_except_at_what_is_silent() -> None:
    model = network()
    model.requires_grad_(False)
    assert model.conditions is not None
    model.conditions.requires_grad_(True)
    loss = model(*causal(rows(3)), memory=model.remember(Given.of([WORDS, BOTH, PICTURES]))).square().sum()
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == name.startswith("conditions."), name


def test_guided_law_is_the_definition_on_the_likeliest_tokens_alone() -> None:
    torch.manual_seed(5)
    given, plain = (torch.randn(3, 10).log_softmax(-1) for _ in range(2))
    found = guided(given, plain, 1.5, 4)
    for row in range(3):
        best = given[row].topk(4).indices
        assert set(found[row].isfinite().nonzero()[:, 0].tolist()) == set(best.tolist())
        assert torch.allclose(found[row][best], 2.5 * given[row][best] - 1.5 * plain[row][best])
    assert torch.equal(guided(given, plain, 0.0, 10), given)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_conditioned_text_is_the_same_with_and_without_drafts_and_batched(guidance: float) -> None:
    """First of other words, then of words that these texts have told: so some are told, one or both of a text's."""
    torch.manual_seed(3)
    model = Denoiser(replace(SHAPE, draft_depth=3)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    conditions, settings = [WORDS, BOTH, PICTURES], [Settings(seed, temperature=0.8, top_k=20) for seed in range(3)]
    told = 0
    for _ in range(3):
        batched = sample_autoregressive(model, settings, conditions=conditions, guidance=guidance)
        texts = [[t for t in canvas[1:].tolist() if t not in (EOS, PAD)] for canvas in batched]
        for text, one, condition in zip(texts, settings, conditions, strict=True):
            for window in (0, 3):
                asked = {"window": window, "condition": condition, "guidance": guidance}
                assert write(model, [], settings=one, open_end=True, **asked).gaps == [text]  # type: ignore[arg-type]
            told += sum(
                list(word) in [text[i : i + len(word)] for i in range(len(text) - 1)] for word in condition.words
            )
        conditions = [
            Condition([[text[4]], [text[9]]], one.pictures) for text, one in zip(texts, conditions, strict=True)
        ]
    assert told >= 3


@torch.no_grad()
def test_hidden_rows_of_a_memory_are_read_as_if_there_were_none() -> None:
    """The scores of a text that is asked for nothing more are those of one without a condition, to the bit."""
    model, tokens = network(), rows()
    memory = model.remember(Given.of([BOTH]))
    hidden = torch.zeros(1, memory.keys[0].shape[2], dtype=torch.bool)
    hidden[0, :2] = True
    assert memory.bias is not None
    keys, values = ([layer[:, :, 2:] for layer in part] for part in (memory.keys, memory.values))
    cut = Memory(keys, values, memory.bias[..., 2:])
    found, wanted = (model(*causal(tokens), memory=one) for one in (memory.without(hidden), cut))
    assert torch.allclose(found, wanted, atol=1e-5)
    nothing = torch.ones(1, hidden.shape[1] + 1, dtype=torch.bool)
    nothing[0, -1] = False
    assert torch.equal(
        model(*causal(tokens), memory=memory.with_an_empty_row().without(nothing)), model(*causal(tokens))
    )


@torch.no_grad()
def test_conditioned_states_are_those_of_a_cache() -> None:
    model, tokens = network(), rows()
    memory = model.remember(Given.of([BOTH]))
    whole = model.logits(model(*causal(tokens), memory=memory)[0], torch.full((12,), NO_PADDING))
    cache, rows_of = Cache.empty(model.config), causal(tokens)
    for part in (torch.arange(0, 5), torch.arange(5, 12)):
        visible = rows_of.visible[:, part][:, :, : int(part[-1]) + 1]
        states = model(tokens[:, part], rows_of.positions[:, part], visible, cache, memory=memory)[0]
        cache.keep(torch.arange(len(part)))
        scores = model.logits(states, torch.full((len(part),), NO_PADDING))
        assert torch.allclose(scores[:, 4:], whole[part][:, 4:], atol=1e-4)
