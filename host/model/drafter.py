"""The chain drafter: drafts the tokens after the next one, one after another.

A draft takes no row of the network: a small network updates the state of the last kept row with the token before the
draft, and the LM head reads the draft from it. The state passes on, so that a draft depends on all drafts before it.
Only the most frequent tokens can be drafts: the head is most of a draft's cost, and rare tokens are seldom drafted
right (after FR-Spec, Zhao et al., arXiv 2502.14856).
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.tokens import BOS, MASK, PAD

DEPTH: Final = 3  # drafts
HIDDEN: Final = 512
LIKELY: Final = 1024
"""Tokens that a draft is one of, at most."""


class Step(nn.Module):
    """One draft's update of the state."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm_state, self.norm_token = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.up = nn.Linear(2 * d_model, HIDDEN)
        self.down = nn.Linear(HIDDEN, d_model)

    def forward(self, state: Tensor, embedding: Tensor) -> Tensor:
        """state, embedding of the token before the draft (M, D) → (M, D)"""
        both = torch.cat([self.norm_state(state), self.norm_token(embedding)], -1)
        change: Tensor = self.down(F.gelu(self.up(both)))
        return state + change


class Chain(nn.Module):
    """A step for each depth. The state of the row at position p and the token of p + 1 give the draft for p + 2."""

    def __init__(self, d_model: int, vocab_size: int, depth: int = DEPTH) -> None:
        super().__init__()
        self.likely: Tensor  # (F,) ascending ids that a draft can be; stage B sets it from its text
        self.register_buffer("likely", torch.arange(max(0, vocab_size - LIKELY), vocab_size))
        self.depths = nn.ModuleList(Step(d_model) for _ in range(depth))


def frequent_tokens(counts: Tensor) -> Tensor:
    """Ascending ids of the LIKELY most frequent tokens, PAD, BOS and MASK last.  counts (V,) → (F,)"""
    counts = counts.clone()
    counts[[PAD, BOS, MASK]] = -1
    return counts.argsort(descending=True, stable=True)[:LIKELY].sort().values
