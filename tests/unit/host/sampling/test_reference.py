"""The reference sampler where its decisions are close: one candidate, ties, the entropy bound."""

from dataclasses import replace

import pytest
import torch

from host.sampling.reference import Settings, commit_pass, drawn
from shared.manifest import Selection
from shared.tokens import BOS, FIRST_TEXT_ID, MASK

VOCAB = 300


def committed(logp: torch.Tensor, settings: Settings) -> list[int]:
    """A canvas of open positions, one for each row of logp (M, V), after one pass."""
    canvas = torch.tensor([BOS, *[MASK] * len(logp)])
    commit_pass(canvas, torch.arange(1, len(canvas)), logp=logp, step=0, settings=settings)
    tokens: list[int] = canvas[1:].tolist()
    return tokens


@pytest.mark.parametrize("selection", ["random", "confidence", "margin", "entropy"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_commit_pass_with_top_k_of_one_is_argmax(selection: Selection, temperature: float) -> None:
    logp = torch.randn((6, VOCAB), generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    logp[:, :FIRST_TEXT_ID] = -1e4
    settings = Settings(seed=3, steps=1, selection=selection, temperature=temperature, top_k=1)
    assert committed(logp, settings) == logp.argmax(-1).tolist()


def test_commit_pass_takes_the_lowest_ids_of_tied_candidates() -> None:
    """A flat law over many tokens: top-k keeps the k lowest ids, in any row and for any k."""
    logp = torch.full((40, VOCAB), -1e4)
    logp[:, 50:] = -torch.tensor(VOCAB - 50.0).log()
    for k in (1, 2, 7):
        drawn = {token for seed in range(20) for token in committed(logp, Settings(seed=seed, steps=1, top_k=k))}
        assert drawn == set(range(50, 50 + k))
    assert set(committed(logp, Settings(seed=0, steps=1, temperature=0.0))) == {50}


def test_commit_pass_keeps_what_is_likelier_than_a_tie_at_top_k() -> None:
    logp = torch.full((1, VOCAB), -1e4)
    logp[0, [200, 30, 40, 60]] = torch.tensor([0.4, 0.2, 0.2, 0.2]).log()
    drawn = {committed(logp, Settings(seed=seed, steps=1, top_k=2))[0] for seed in range(60)}
    assert drawn == {200, 30}


def test_entropy_bound_is_the_sum_less_the_largest() -> None:
    """Fair choices among 2, 4 and 8 tokens; by ascending entropy the rule counts 0, ln 2, ln 2 + ln 4."""
    logp = torch.full((3, VOCAB), -1e4)
    for row, choices in enumerate((4, 8, 2)):
        logp[row, 100 : 100 + choices] = -torch.tensor(float(choices)).log()
    ln2 = 0.6931
    for bound, count in [(0.0, 1), (0.9 * ln2, 1), (1.1 * ln2, 2), (2.9 * ln2, 2), (3.1 * ln2, 3)]:
        tokens = committed(logp, Settings(seed=1, steps=64, entropy_bound=bound))
        assert sum(token != MASK for token in tokens) == count
        assert tokens[2] != MASK


def test_drawn_takes_a_seed_for_each_row() -> None:
    logp, places = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).log_softmax(-1), torch.arange(5)
    seeds, settings = [3, 3, 2**40, 0, 2**63 - 1], Settings(0, temperature=0.9, top_k=7, top_p=0.9)
    together = drawn(logp, places, settings, torch.tensor(seeds))
    for row, seed in enumerate(seeds):
        alone = drawn(logp[row : row + 1], places[row : row + 1], replace(settings, seed=seed))
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))
