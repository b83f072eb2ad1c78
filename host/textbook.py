"""The loop of a textbook, which `host.bench train` races against ours; nothing else uses it.

nn.MultiheadAttention, dropout, scores of every position, float32, canvases of full length, AdamW: what the first
version of such a model usually looks like, and what this model family began as. It learns from the same corrupted
canvases, with plain cross-entropy on masked positions.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from host.model import ModelConfig, timestep_embedding

DROPOUT: Final = 0.1


class TextbookBlock(nn.Module):
    """Pre-norm transformer block from torch's own parts."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = nn.MultiheadAttention(d, heads, dropout=DROPOUT, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(4 * d, d))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)"""
        y = self.norm1(x)
        x = x + self.dropout(self.attention(y, y, y, need_weights=False)[0])
        hidden: Tensor = self.dropout(self.feed_forward(self.norm2(x)))
        return x + hidden


class Textbook(nn.Module):
    """The same widths, depths and parameters as `host.model.Denoiser`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.tokens, self.positions = nn.Embedding(config.vocab_size, d), nn.Embedding(config.canvas_len, d)
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.blocks = nn.Sequential(*(TextbookBlock(d, config.heads) for _ in range(config.layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, config.vocab_size)

    def forward(self, canvas: Tensor, t: Tensor) -> Tensor:
        """canvas (B, L), t (B,) → (B, L, V)"""
        x = self.tokens(canvas) + self.positions.weight + self.time(timestep_embedding(t, self.config.d_model))[:, None]
        scores: Tensor = self.head(self.norm(self.blocks(x)))
        return scores


def textbook_step(model: Textbook, optimizer: torch.optim.Optimizer, x0: Tensor, xt: Tensor, t: Tensor) -> None:
    """One optimizer step on whole canvases x0, xt (B, L), t (B,)."""
    scores = model(xt, t)
    wanted = torch.where(xt != x0, x0, -100)
    loss = F.cross_entropy(scores.flatten(0, 1), wanted.flatten(), ignore_index=-100)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
