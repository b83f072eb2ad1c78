"""A transformer block: attention and feed-forward, each after a LayerNorm and added to the residual stream.

B: batch, N: rows, S: cached rows, D: width, H: heads.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]
"""Of the rows of a layer, each (B, H, N, D/H)."""


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Scaled dot-product attention.  q, k, v (B, H, L, D/H), bias (B or 1, H, L, L), added to scores → (B, H, L, D/H)

    On a CPU in bf16, plain matrix products take half the time of torch's kernel, forward and backward.
    """
    if q.device.type != "cpu" or q.dtype is not torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, L, L)
    mixed: Tensor = (scores if bias is None else scores + bias).softmax(-1) @ v
    return mixed


class Block(nn.Module):
    """Attention and feed-forward."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        d = d_model
        self.heads = heads
        self.dropout: float = 0.0  # of what is added to the residual stream, in training
        self.norm1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.attention_out = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        *,
        at: Tensor | None = None,
        cached: KeysValues | None = None,
        read: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """x (B, N, D), bias (B or 1, H, N, S + N) → (B, N, D), or (M, D) for rows `at` (M,), counted over the batch;
        and the rows' keys and values.

        cached: of S rows before these. read: what to add to attention's result, given the rows after the first
        LayerNorm, (B, N, D) → (B, N, D).
        """
        b, n, d = x.shape
        normed = self.norm1(x)
        q, k, v = self.qkv(normed).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        fresh = k, v
        if cached is not None:
            k, v = torch.cat([cached[0], k], 2), torch.cat([cached[1], v], 2)
        mixed = attend(q, k, v, bias).transpose(1, 2).reshape(b, n, d)
        more = None if read is None else read(normed)
        if at is not None:
            x, mixed = x.view(-1, d).index_select(0, at), mixed.view(-1, d).index_select(0, at)
            more = None if more is None else more.view(-1, d).index_select(0, at)
        x = x + F.dropout(self.attention_out(mixed), self.dropout, self.training)
        if more is not None:
            x = x + F.dropout(more, self.dropout, self.training)
        hidden = self.down(F.gelu(self.up(self.norm2(x))))
        return x + F.dropout(hidden, self.dropout, self.training), fresh
