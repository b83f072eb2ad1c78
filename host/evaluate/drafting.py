"""What a drafter keeps: tokens per pass by window and temperature, by common noise and by rejection sampling.

The law's own texts are written first. Drafts never change a text, so one pass over it tells for every position how
many drafts would have been kept there, and from that the passes that each window takes, exactly as `blocks.write`.
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
from shared.manifest import Figure
from shared.tokens import PAD

TEMPERATURES: Final = (0.0, 0.7, 0.8, 1.0)
PROMPT_TOKENS: Final = 16
REPEATS: Final = 8  # of the rejection rule's own draws


class Drafting(msgspec.Struct, frozen=True):
    """Tokens per pass with up to `window` drafts, window + 1 rows.

    agreement: share of drafts of each depth that were kept where the ones before were.
    """

    temperature: float
    window: int
    tokens_per_pass: Figure
    rejection: Figure
    agreement: tuple[float, ...]


@dataclass(frozen=True)
class Agreement:
    """Of one text: for each row that can be the last kept one, whether each draft is the law's token, and the
    probability that rejection sampling would have kept it. The text's tokens stand from `first` on.
    """

    same: np.ndarray  # (N, depth) bool
    accepted: np.ndarray  # (N, depth)
    first: int
    end: int  # position after the last token, EOS included


def evaluate_drafting(
    model: Denoiser, held_out: HeldOut, temperatures: Sequence[float] = TEMPERATURES, dtype: torch.dtype | None = None
) -> list[Drafting]:
    """Prompts: the first tokens of held-out stories, continued by the law."""
    assert model.drafter is not None
    stories = held_out.canvases[held_out.canvases[:, PROMPT_TOKENS + 1] != PAD]
    prompts = torch.from_numpy(stories[:, 1 : 1 + PROMPT_TOKENS].astype(np.int64))
    depth = len(model.drafter.depths)
    top_k = min(TOP_K, model.config.vocab_size)
    made = []
    for temperature in temperatures:
        settings = [Settings(seed, temperature=temperature, top_k=top_k) for seed in range(len(prompts))]
        texts = sample_autoregressive(model, settings, dtype, prompts)
        found = [agreement(model, text, PROMPT_TOKENS + 1, one) for text, one in zip(texts, settings, strict=True)]
        for window in range(1, depth + 1):
            made.append(_summary(found, temperature, window))
    return made


@torch.no_grad()
def agreement(model: Denoiser, text: Tensor, first: int, settings: Settings) -> Agreement:
    """Drafts after every row of a text (L,), each given the text's own tokens before it."""
    assert model.drafter is not None
    n = int((text != PAD).sum())
    states = model(*causal(text[None, : n - 1]))[0]  # row i scores token i + 1
    law = _log_probabilities(model, states)
    depth = len(model.drafter.depths)
    same, accepted = np.zeros((n, depth), bool), np.zeros((n, depth))
    state = states
    for k, step in enumerate(model.drafter.depths):
        rows = n - 2 - k  # with a token after the draft's place's own predecessor
        if rows <= 0:
            break
        state = step(state[:rows], model.token_embedding(text[k + 1 : k + 1 + rows]))
        draft, place = _log_probabilities(model, state), torch.arange(rows) + k + 2
        token = text[place]
        same[:rows, k] = (drawn(draft, place, settings)[0] == token).numpy()
        p, q = _filtered(law[place - 1], token, settings), _filtered(draft, token, settings)
        accepted[:rows, k] = (q / p).clamp(max=1.0).numpy()
    return Agreement(same, accepted, first, n)


def _log_probabilities(model: Denoiser, states: Tensor) -> Tensor:
    return model.logits(states, torch.full((len(states),), NO_PADDING)).log_softmax(-1)


def _filtered(logp: Tensor, token: Tensor, settings: Settings) -> Tensor:
    """The token's probability after temperature and top-k; at temperature 0 of the best alone.  (M, V), (M,) → (M,)"""
    best = logp.topk(settings.top_k).values
    mine = logp.gather(1, token[:, None])
    if settings.temperature == 0:
        return (mine >= best[:, :1])[:, 0].double()
    share = (mine.double() / settings.temperature - (best.double() / settings.temperature).logsumexp(-1, True)).exp()
    return torch.where(mine >= best[:, -1:], share, 0.0)[:, 0]


def passes(found: Agreement, window: int, kept: np.ndarray) -> list[int]:
    """Tokens that each pass commits. kept (N, depth): whether each row's drafts are kept."""
    made, row = [1], found.first - 1  # the first pass has no drafts: it starts from the prompt's last row
    while row + 2 < found.end:
        run = 0
        while run < window and row + 2 + run < found.end - 1 and kept[row, run]:
            run += 1
        made.append(min(run + 1, found.end - row - 2))
        row += made[-1]
    return made


def _summary(found: Sequence[Agreement], temperature: float, window: int) -> Drafting:
    common = [passes(one, window, one.same) for one in found]
    rng = np.random.default_rng(SEED)
    rejection = [
        [passes(one, window, rng.random(one.accepted.shape) < one.accepted) for one in found] for _ in range(REPEATS)
    ]
    shares, reached = [], [one.same[one.first - 1 : one.end - 2] for one in found]
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


def _per_pass(made: Sequence[Sequence[list[int]]]) -> Figure:
    tokens = np.array([[sum(text) for text in texts] for texts in made], float)
    return ratio(tokens, np.array([[len(text) for text in texts] for texts in made], float))


def print_drafting(found: Sequence[Drafting]) -> None:
    """One line for each temperature and window."""
    print(
        f"{'temperature':>11} {'drafts':>6} {'rows':>4} {'tokens per pass':>16} {'rejection sampling':>18} "
        "agreement by depth"
    )
    for one in found:
        common, rejection = (f"{f.value:.3f} ± {f.stderr:.3f}" for f in (one.tokens_per_pass, one.rejection))
        depths = " ".join(f"{share:.2f}" for share in one.agreement)
        print(f"{one.temperature:11} {one.window:6} {one.window + 1:4} {common:>16} {rejection:>18} {depths}")
