"""Each layout against its picture, and the property that makes it one: what a row cannot see does not change it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from host.model.layouts import Gap, Rows, canvas, causal, drafts, evidence, stack
from host.model.network import BIAS_FLOOR, RELATIVE_UNIT, Cache, Denoiser, config_named
from shared.tokens import EOS, FIRST_TEXT_ID, MASK, PAD

VOCAB, LENGTH = 64, 100


@pytest.fixture(scope="module")
def model() -> Denoiser:
    """Biased towards looking far, on both sides of the floor."""
    torch.manual_seed(1)
    network = Denoiser(replace(config_named("debug"), vocab_size=VOCAB, canvas_len=LENGTH, time_input=False)).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


def text(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(FIRST_TEXT_ID, VOCAB, shape))


def causal_rows() -> Rows:
    return causal(text(2, 9))


def draft_rows() -> Rows:
    return drafts(text(2, 6), torch.tensor([0, 2, 5]), depth=3)


def evidence_rows() -> Rows:
    """Gaps at 2 to 4 (two tokens so far) and at 7 to 8, and an open end from 11 on."""
    gaps = [Gap(9, 2, [10, 11]), Gap(8, 7, [20]), Gap(7, 11, [5, 6])]
    return evidence([4, 9, 30, 8, 31, 7], [0, 1, 5, 6, 9, 10], gaps)


def canvas_rows() -> Rows:
    tokens = text(2, 8)
    tokens[0, 5], tokens[0, 6:] = EOS, PAD
    tokens[1, [2, 4]] = MASK
    return canvas(tokens)


def stacked_rows() -> Rows:
    return stack([evidence_rows(), evidence([4, 9], [0, 1], [Gap(9, 2, [10])])], multiple=8)


LAYOUTS: list[Callable[[], Rows]] = [causal_rows, draft_rows, evidence_rows, canvas_rows, stacked_rows]


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_layout_hides_tokens_from_a_row_to_the_bit(model: Denoiser, layout: Callable[[], Rows]) -> None:
    """Every row: all tokens that it cannot see, directly or through others, become other tokens."""
    tokens, positions, visible = layout()
    batch, n = tokens.shape
    before = model(tokens, positions, visible)
    for b in range(batch):
        sees = visible[min(b, len(visible) - 1)]
        assert torch.equal((sees.float() @ sees.float() > 0) | sees, sees)  # what a row sees sees nothing else
        for row in range(n):
            assert sees[row, row] or layout is canvas_rows
            changed = tokens.clone()
            hidden = ~sees[row]
            hidden[row] = False
            changed[b, hidden] = (tokens[b, hidden] + 7) % VOCAB
            assert torch.equal(model(changed, positions, visible)[b, row], before[b, row])


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_layout_lets_each_visible_token_change_a_row(model: Denoiser, layout: Callable[[], Rows]) -> None:
    tokens, positions, visible = layout()
    before = model(tokens, positions, visible)
    for key in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[0, key] = (tokens[0, key] + 7) % VOCAB
        moved = (model(changed, positions, visible)[0] != before[0]).any(-1)
        assert torch.equal(moved, visible[0, :, key] | (torch.arange(len(moved)) == key))


def test_drafts_layout_is_its_picture() -> None:
    tokens, positions, visible = drafts(torch.tensor([[4, 5, 6]]), torch.tensor([0, 1]), depth=2)
    assert tokens.tolist() == [[4, 5, 6, MASK, MASK, MASK, MASK]]
    assert positions.tolist() == [[0, 1, 2, 1, 2, 2, 3]]
    picture = ["x......", "xx.....", "xxx....", "x..x...", "x..xx..", "xx...x.", "xx...xx"]
    assert ["".join(".x"[int(cell)] for cell in row) for row in visible[0]] == picture


def test_evidence_layout_is_its_picture() -> None:
    tokens, positions, visible = evidence([4, 7], [0, 3], [Gap(4, 1, [5, 6])])
    assert tokens.tolist() == [[4, 7, 4, 5, 6]]
    assert positions.tolist() == [[0, 3, 0, 1, 2]]
    picture = ["xx...", "xx...", "xxx..", "xxxx.", "xxxxx"]
    assert ["".join(".x"[int(cell)] for cell in row) for row in visible[0]] == picture


@pytest.mark.parametrize("layout", [causal_rows, evidence_rows])
@torch.no_grad()
def test_cache_scores_later_rows_as_in_one_pass(model: Denoiser, layout: Callable[[], Rows]) -> None:
    """Evidence or prompt first, then row by row; a rejected row in between leaves nothing."""
    tokens, positions, visible = (part[:1] for part in layout())
    whole = model(tokens, positions, visible)[0]
    cache, start = Cache.empty(model.config), 6
    first = model(tokens[:, :start], positions[:, :start], visible[:, :start, :start], cache)[0]
    cache.keep(torch.arange(start))
    assert torch.allclose(first, whole[:start], atol=1e-5)
    for row in range(start, tokens.shape[1]):
        rejected = torch.tensor([[tokens[0, row], 40]])
        at = torch.stack([positions[:, row], positions[:, row] + 1], 1)
        sees = torch.cat([visible[:, row : row + 1, :row].expand(1, 2, row), torch.ones(1, 2, 2).tril().bool()], 2)
        states = model(rejected, at, sees, cache)[0]
        cache.keep(torch.tensor([0]))
        assert torch.allclose(states[0], whole[row], atol=1e-5)
    assert len(cache) == tokens.shape[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_bias_is_that_of_the_logical_distance(model: Denoiser, layout: Callable[[], Rows]) -> None:
    _, positions, visible = layout()
    bias = model.attention_bias(positions, visible)
    for b, head, i, j in np.ndindex(*bias.shape):
        place = positions[min(b, len(positions) - 1)]
        stored = RELATIVE_UNIT * model.relative_bias[head, place[j] - place[i] + LENGTH - 1]
        sees = visible[min(b, len(visible) - 1), i, j]
        assert bias[b, head, i, j] == (stored.clamp(min=BIAS_FLOOR) if sees else -torch.inf)


def test_attention_bias_has_a_floor(model: Denoiser) -> None:
    far = model.attention_bias(torch.arange(LENGTH)[None], torch.ones(1, LENGTH, LENGTH, dtype=torch.bool))
    assert far.min() == BIAS_FLOOR and (RELATIVE_UNIT * model.relative_bias).min() < BIAS_FLOOR


@torch.no_grad()
def test_stack_scores_sequences_as_each_alone(model: Denoiser) -> None:
    parts = [evidence_rows(), causal(text(1, 5)), causal(text(1, 3, seed=2))]
    together = model(*stack(parts, multiple=16))
    assert together.shape[1] == 16
    for part, states in zip(parts, together, strict=True):
        assert torch.allclose(model(*part)[0], states[: part.tokens.shape[1]], atol=1e-5)
