"""The chain drafter: drafts the tokens after the next one from the state of the last kept row, one after another.

It runs no row of the network: each draft is a small network's correction of that state, which knows the token before
it, read by the LM head. The state goes on from draft to draft, so that a draft knows all drafts before it.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTH: Final = 3  # drafts
HIDDEN: Final = 512


class Step(nn.Module):
    """One draft's correction of the state."""

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
    """A step for each draft. The state of the row at position p and the token of p + 1 make the draft for p + 2."""

    def __init__(self, d_model: int, depth: int = DEPTH) -> None:
        super().__init__()
        self.depths = nn.ModuleList(Step(d_model) for _ in range(depth))
