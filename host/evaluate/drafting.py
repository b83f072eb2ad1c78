"""Tokens per pass with a drafter, by window and temperature: with common noise and with rejection sampling.

Drafts never change a text. So the law writes the texts first; one pass over each then shows which drafts would have
been kept after every position, and so the passes that `blocks.write` takes with any window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import torch
from torch import Tensor

from host.evaluate.likelihood import SEED, HeldOut, ratio
from host.model.layouts import causal
from host.model.network import NO_PADDING, Denoiser
from host.sampling.many import sample_autoregressive
from host.sampling.reference import TOP_K, Settings, drawn
from shared.errors import DataError
from shared.figures import Figure
from shared.tokens import PAD

TEMPERATURES: Final = (0.0, 0.7, 0.8, 1.0)
PROMPT_TOKENS: Final = 16
REPEATS: Final = 8  # draws of the rejection rule


class Drafting(msgspec.Struct, frozen=True):
    """Tokens per pass with up to `window` drafts, which take window + 1 rows.

    agreement: at each depth, the share of drafts kept where all before them were.
    """

    temperature: float
    window: int
    tokens_per_pass: Figure
    rejection: Figure
    agreement: tuple[float, ...]


@dataclass(frozen=True)
class Agreement:
    """Drafts of one text, made after each of its rows."""

    same: np.ndarray  # (N, depth) bool: the draft is the law's token
    accepted: np.ndarray  # (N, depth) probability that rejection sampling keeps the draft
    first: int  # position of the first written token
    end: int  # position after the last token, EOS included


def evaluate_drafting(
    model: Denoiser, held_out: HeldOut, temperatures: Sequence[float] = TEMPERATURES, dtype: torch.dtype | None = None
) -> list[Drafting]:
    """Measure the drafter on texts that the law writes after the first tokens of held-out stories.

    DataError when no story is long enough.
    """
    assert model.drafter is not None
    stories = long_enough(held_out)
    if not len(stories):
        raise DataError(f"{held_out.name} has no story of more than {PROMPT_TOKENS} tokens, to measure drafts on")
    prompts = torch.from_numpy(stories[:, 1 : 1 + PROMPT_TOKENS].astype(np.int64))
    depth = len(model.drafter.depths)
    top_k = min(TOP_K, model.config.vocab_size)
    measured = []
    for temperature in temperatures:
        settings = [Settings(seed, temperature=temperature, top_k=top_k) for seed in range(len(prompts))]
        texts = sample_autoregressive(model, settings, dtype=dtype, prompts=prompts)
        drafted = [agreement(model, text, PROMPT_TOKENS + 1, one) for text, one in zip(texts, settings, strict=True)]
        measured += [_summary(drafted, temperature, window) for window in range(1, depth + 1)]
    return measured


def long_enough(held_out: HeldOut) -> np.ndarray:
    """Stories of more tokens than a prompt has, (m, L)."""
    canvases: np.ndarray = held_out.canvases[held_out.canvases[:, PROMPT_TOKENS + 1] != PAD]
    return canvases


@torch.no_grad()
def agreement(model: Denoiser, text: Tensor, first: int, settings: Settings) -> Agreement:
    """Drafts after every row of a text (L,), given the text's own tokens before each. Drawn on the CPU."""
    assert model.drafter is not None
    n = int((text != PAD).sum())
    there = text.to(model.device)
    states = model(*causal(there[None, : n - 1]))[0]  # row i scores token i + 1
    law = model.logits(states, NO_PADDING).log_softmax(-1).cpu()
    depth = len(model.drafter.depths)
    same, accepted = np.zeros((n, depth), bool), np.zeros((n, depth))
    state = states
    for k, step in enumerate(model.drafter.depths):
        rows = n - 2 - k  # rows whose draft at this depth has a token to meet
        if rows <= 0:
            break
        state = step(state[:rows], model.token_embedding(there[k + 1 : k + 1 + rows]))
        draft = model.draft_logits(state, NO_PADDING).log_softmax(-1).cpu()
        place = torch.arange(rows) + k + 2
        token = text[place]
        same[:rows, k] = (drawn(draft, place, settings)[0] == token).numpy()
        p, q = _filtered(law[place - 1], token, settings), _filtered(draft, token, settings)
        accepted[:rows, k] = (q / p).clamp(max=1.0).numpy()
    return Agreement(same, accepted, first, n)


def _filtered(logp: Tensor, token: Tensor, settings: Settings) -> Tensor:
    """The token's probability after temperature and top-k; 0 or 1 at temperature 0.  (M, V), (M,) → (M,)"""
    best = logp.topk(settings.top_k).values
    mine = logp.gather(1, token[:, None])
    if settings.temperature == 0:
        return (mine >= best[:, :1])[:, 0].double()
    share = (mine.double() / settings.temperature - (best.double() / settings.temperature).logsumexp(-1, True)).exp()
    return torch.where(mine >= best[:, -1:], share, 0.0)[:, 0]


def passes(text: Agreement, window: int, kept: np.ndarray) -> list[int]:
    """Tokens that each pass commits. kept (N, depth): whether each row's drafts are kept."""
    committed, row = [1], text.first - 1  # the first pass has no drafts: it starts from the prompt's last row
    while row + 2 < text.end:
        run = 0
        while run < window and row + 2 + run < text.end - 1 and kept[row, run]:
            run += 1
        committed.append(min(run + 1, text.end - row - 2))
        row += committed[-1]
    return committed


def _summary(texts: Sequence[Agreement], temperature: float, window: int) -> Drafting:
    common = [passes(one, window, one.same) for one in texts]
    rng = np.random.default_rng(SEED)
    rejection = [
        [passes(one, window, rng.random(one.accepted.shape) < one.accepted) for one in texts] for _ in range(REPEATS)
    ]
    shares, reached = [], [one.same[one.first - 1 : one.end - 2] for one in texts]
    for k in range(window):
        before = np.concatenate([part[part[:, :k].all(1), k] for part in reached])
        shares.append(float(before.mean()) if len(before) else 0.0)
    return Drafting(
        temperature=temperature,
        window=window,
        tokens_per_pass=_per_pass([common]),
        rejection=_per_pass(rejection),
        agreement=tuple(shares),
    )


def _per_pass(committed: Sequence[Sequence[list[int]]]) -> Figure:
    tokens = np.array([[sum(text) for text in texts] for texts in committed], float)
    return ratio(tokens, np.array([[len(text) for text in texts] for texts in committed], float))


def print_drafting(rows: Sequence[Drafting]) -> None:
    """One line for each temperature and window."""
    print(
        f"{'temperature':>11} {'drafts':>6} {'rows':>4} {'tokens per pass':>16} {'rejection sampling':>18} "
        "agreement by depth"
    )
    for one in rows:
        common, rejection = (f"{f.value:.3f} ± {f.stderr:.3f}" for f in (one.tokens_per_pass, one.rejection))
        depths = " ".join(f"{share:.2f}" for share in one.agreement)
        print(f"{one.temperature:11} {one.window:6} {one.window + 1:4} {common:>16} {rejection:>18} {depths}")
