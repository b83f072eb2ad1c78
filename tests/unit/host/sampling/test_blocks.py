"""The reference of block decoding: the law's own text, whatever drafts it, and the laws of rooms that it stands on."""

import numpy as np
import pytest
import torch

from host.model.layouts import Gap, causal, evidence
from host.model.network import NO_PADDING, Denoiser
from host.sampling.blocks import Template, write
from host.sampling.many import sample_autoregressive
from host.sampling.reference import Settings, drawn
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, PAD
from tests.support.decided import decided_network

LENGTH, VOCAB = 48, 40


def law(seed: int, temperature: float = 0.8, top_k: int = VOCAB, top_p: float = 1.0) -> Settings:
    return Settings(seed, temperature=temperature, top_k=top_k, top_p=top_p)


LAWS = [law(3, 0.8), law(4, 1.0, top_k=5), law(5, 0.0), law(6, 1.3, top_p=0.7), law(7, 0.9, top_k=1)]
TEMPLATES: list[tuple[Template, bool]] = [
    ([], True),
    ([[7, 8, 9]], True),
    ([[7, 8], 6, [9, 10, 11], 4, [12]], False),
    ([5, [9, 10], 3, [11]], True),
]


@pytest.fixture(scope="module")
def model() -> Denoiser:
    return decided_network(VOCAB, LENGTH, depth=3)


def by_definition(model: Denoiser, template: Template, settings: Settings, open_end: bool) -> list[list[int]]:
    """A whole pass over all rows for every token, no cache."""
    tokens, places, gaps, position = [BOS], [0], [], 1
    for part in template:
        if isinstance(part, int):
            gaps.append([position, part, tokens[-1]])
            position += part
        else:
            tokens, places = tokens + part, places + list(range(position, position + len(part)))
            position += len(part)
    if open_end:
        gaps.append([position, LENGTH - position, tokens[-1]])
    else:
        tokens, places = [*tokens, EOS], [*places, position]
    rows: list[Gap] = []
    filled: list[list[int]] = []
    for first, size, before in gaps:
        found: list[int] = []
        while len(found) < size:
            if open_end and len(gaps) == 1:
                layout = causal(torch.tensor([tokens + found]))
            else:
                layout = evidence(tokens, places, [*rows, Gap(before, first, found)])
            with torch.no_grad():
                logp = model.logits(model(*layout)[0, -1:], torch.tensor([NO_PADDING])).log_softmax(-1)
            token = int(drawn(logp, torch.tensor([first + len(found)]), settings)[0])
            if token == EOS:
                break
            found.append(token)
        rows.append(Gap(before, first, found[: size - 1]))  # the last token of a full gap has no row
        filled.append(found)
    return filled


@pytest.mark.parametrize("settings", LAWS, ids=str)
@pytest.mark.parametrize(("template", "open_end"), TEMPLATES)
def test_write_with_drafts_changes_the_passes_and_never_the_text(
    model: Denoiser, template: Template, open_end: bool, settings: Settings
) -> None:
    plain = write(model, template, settings=settings, open_end=open_end)
    assert plain.gaps == by_definition(model, template, settings, open_end)
    assert set(plain.kept) <= {1}
    sizes = [part for part in template if isinstance(part, int)]
    assert all(len(gap) <= size for gap, size in zip(plain.gaps, sizes, strict=False))
    for window in (1, 3):
        drafted = write(model, template, settings=settings, open_end=open_end, window=window)
        assert drafted.gaps == plain.gaps
        assert sum(drafted.kept) == sum(plain.kept) and max(drafted.kept) <= window + 1
        assert len(drafted.kept) <= len(plain.kept)


def test_write_keeps_part_of_the_drafts(model: Denoiser) -> None:
    kept = [count for seed in range(8) for count in write(model, [], settings=law(seed), open_end=True, window=3).kept]
    print(f"{np.mean(kept):.2f} tokens in a pass")
    assert {1, 2} <= set(kept)


def test_drawn_tokens_follow_the_filtered_law() -> None:
    """4,000 positions, against the probabilities that temperature, top-k and top-p leave."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 12)
    logits[0, [PAD, BOS]] = -torch.inf
    p = (logits[0].double() / 0.7).softmax(-1)
    order = p.argsort(descending=True)[:6]
    kept = p[order] / p[order].sum()
    kept = torch.where(kept.cumsum(0) - kept < 0.9, kept, 0.0)
    expected = np.zeros(12)
    expected[order.numpy()] = (kept / kept.sum()).numpy()
    found = drawn(logits.log_softmax(-1).expand(4000, -1), torch.arange(4000), law(11, 0.7, 6, 0.9))[0].numpy()
    observed = np.bincount(found, minlength=12)
    possible = expected > 0
    assert 1 < possible.sum() < 6 and observed[~possible].sum() == 0
    chi = ((observed - 4000 * expected)[possible] ** 2 / (4000 * expected[possible])).sum()
    assert chi < 20.5  # at most five degrees of freedom, 0.1 %


def test_sample_autoregressive_is_the_same_as_one_by_one(model: Denoiser) -> None:
    prompts = torch.from_numpy(np.random.default_rng(0).integers(FIRST_TEXT_ID, VOCAB, (5, 4)))
    together = sample_autoregressive(model, [law(seed) for seed in range(5)], prompts=prompts)
    for seed, (prompt, canvas) in enumerate(zip(prompts.tolist(), together.tolist(), strict=True)):
        alone = write(model, [prompt], settings=law(seed), open_end=True)
        text = [BOS, *prompt, *alone.gaps[0], EOS]
        assert canvas == (text + [PAD] * LENGTH)[:LENGTH]


def test_write_closes_gaps_that_end_early_in_their_place(model: Denoiser) -> None:
    texts = [write(model, [[7, 8], 6, [9, 10]], settings=law(seed, 1.5), open_end=False) for seed in range(30)]
    closed = [text.gaps[0] for text in texts]
    assert min(len(gap) for gap in closed) < 6 == max(len(gap) for gap in closed)
