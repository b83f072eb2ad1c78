"""Which tokens a draft can be."""

from dataclasses import replace

import torch

from host.model.drafter import LIKELY, frequent_tokens
from host.model.network import ANY_END, Denoiser, config_named
from shared.tokens import BOS, MASK, PAD


def test_frequent_tokens_are_the_most_frequent_and_never_padding() -> None:
    counts = torch.zeros(8192, dtype=torch.long)
    counts[[PAD, BOS, MASK]] = 100_000
    counts[5000], counts[2000:5000] = 9000, torch.arange(3000)
    found = frequent_tokens(counts)
    assert len(found) == LIKELY and bool((found.diff() > 0).all())
    assert 5000 in found and not torch.isin(torch.tensor([PAD, BOS, MASK]), found).any()
    assert int(found.min()) == 5000 - (LIKELY - 1)  # 5000 itself is the last
    assert frequent_tokens(torch.zeros(300)).tolist() == list(range(300))  # a small vocabulary is whole


def test_draft_logits_are_those_of_likely_tokens_alone() -> None:
    model = Denoiser(replace(config_named("debug"), vocab_size=64, draft_depth=1))
    assert model.drafter is not None
    likely = torch.arange(10, 30)
    model.drafter.likely = likely
    state, ends = torch.randn(5, model.config.d_model), torch.full((5,), ANY_END)
    found, whole = model.draft_logits(state, ends), model.logits(state, ends)
    assert torch.equal(found[:, likely], whole[:, likely])
    assert bool(found[:, :10].isinf().all() and found[:, 30:].isinf().all())
