"""The network: a bidirectional pre-norm transformer that scores every position of a canvas.

`python -m host.model` prints the configurations. B: batch, L: canvas length, D: width, H: heads, V: vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import ConfigError
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD

CANVAS_LEN: Final = 256
RELATIVE_UNIT: Final = 10.0
"""Of the stored relative bias, in scores: an optimizer's step then moves a bias ten times as far as a weight."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a network. vocab_size comes from the data folder's tokenizer."""

    name: str
    d_model: int
    layers: int
    heads: int
    vocab_size: int = 8192
    canvas_len: int = CANVAS_LEN
    time_input: bool = True


CONFIGS: Final = {
    config.name: config
    for config in (
        ModelConfig("debug", d_model=64, layers=2, heads=2, vocab_size=512),
        ModelConfig("tiny", d_model=256, layers=4, heads=4),
        ModelConfig("small", d_model=384, layers=6, heads=6),
        ModelConfig("medium", d_model=512, layers=8, heads=8),
        ModelConfig("large", d_model=640, layers=10, heads=10),
    )
}


def config_named(name: str) -> ModelConfig:
    """The configuration of that name; ConfigError lists the names there are."""
    if name not in CONFIGS:
        raise ConfigError(f"unknown configuration {name!r}: choose one of {', '.join(CONFIGS)}")
    return CONFIGS[name]


def first_end(canvas: Tensor) -> Tensor:
    """Position of the first visible EOS or PAD in each row, L where there is none.  (B, L) → (B,)"""
    length = canvas.shape[1]
    position = torch.arange(length, device=canvas.device)
    return torch.where((canvas == EOS) | (canvas == PAD), position, length).amin(1)


def ends_impossible(canvas: Tensor) -> Tensor:
    """True left of a visible text token, where neither EOS nor PAD can stand.  (B, L) → (B, L)"""
    position = torch.arange(canvas.shape[1], device=canvas.device)
    last_text = torch.where(canvas >= FIRST_TEXT_ID, position, -1).amax(1)
    return position < last_text[:, None]


def timestep_embedding(t: Tensor, d_model: int) -> Tensor:
    """Sinusoids of 1000·t, always float32: in low precision the phase is lost.  (B,) → (B, D)"""
    half = d_model // 2
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    phase = 1000.0 * t.float()[:, None] * frequency
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def first_relative_bias(config: ModelConfig) -> Tensor:
    """What attention adds to the score of a key at distance j − i, column j − i + L − 1, at first.  → (H, 2·L − 1)

    Each head looks less far than the next, by slopes from 1 down; the last looks everywhere (Press et al., ALiBi, arXiv
    2108.12409). Learned from there, by all layers in common (Raffel et al., T5, arXiv 1910.10683).
    """
    distance = torch.arange(1 - config.canvas_len, config.canvas_len).abs()
    slope = 2.0 ** (-8 * torch.arange(config.heads) / config.heads)
    slope[-1] = 0.0
    return -slope[:, None] * distance / RELATIVE_UNIT


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Scaled dot-product attention.  q, k, v (B, H, L, D/H), bias (B or 1, H, L, L), added to scores → (B, H, L, D/H)

    On a CPU in bf16, plain matrix products take half the time of torch's kernel, forward and backward.
    """
    if q.device.type != "cpu" or q.dtype is not torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias  # (B, H, L, L)
    mixed: Tensor = scores.softmax(-1) @ v
    return mixed


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh; on a CPU in bf16 by erf, at most 5e-4 away, for which torch has kernels five times as fast."""
    exact = x.device.type == "cpu" and x.dtype is torch.bfloat16
    return F.gelu(x, approximate="none" if exact else "tanh")


class Block(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.d_model
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.attention_out = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)

    def forward(self, x: Tensor, bias: Tensor, at: Tensor | None = None) -> Tensor:
        """x (B, L, D) → (B, L, D), or (M, D) for the positions `at` (M,), counted over all rows."""
        b, length, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, length, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = attend(q, k, v, bias).transpose(1, 2).reshape(b, length, d)
        if at is not None:
            x, mixed = x.view(-1, d).index_select(0, at), mixed.view(-1, d).index_select(0, at)
        x = x + self.attention_out(mixed)
        hidden: Tensor = self.down(gelu(self.up(self.norm2(x))))
        return x + hidden


class Denoiser(nn.Module):
    """Scores the tokens that masked positions may hold; the same body serves the autoregressive baseline."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.token_embedding = nn.Embedding(config.vocab_size, d)
        self.position_embedding = nn.Embedding(config.canvas_len, d)
        self.relative_bias = nn.Parameter(first_relative_bias(config))
        self.time_mlp = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d)) if config.time_input else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, config.vocab_size)
        never_control = torch.zeros(2, FIRST_TEXT_ID, dtype=torch.bool)  # row 1: also left of visible text
        never_control[:, [MASK, BOS]] = True
        never_control[1, [EOS, PAD]] = True
        self.never_control: Tensor
        self.register_buffer("never_control", never_control, persistent=False)
        self.apply(self._init)
        for name, weight in self.named_parameters():
            if name.endswith(("attention_out.weight", "down.weight")):  # two a block end in the residual stream
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers))

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(
        self, canvas: Tensor, t: Tensor | None = None, causal: bool = False, at: Tensor | None = None
    ) -> Tensor:
        """What `logits` reads each position's scores from.  canvas (B, L) integer ids, t (B,) if timed → (B, L, D)

        at (M,): positions counted over all rows, i·L + j, none of them a BOS; only those are read out.  → (M, D)

        The read-out is shifted: position i is scored from the state at i − 1, in diffusion as in the autoregressive
        objective, so that a diffusion run started from autoregressive weights predicts well from its first step.
        Position 0 holds BOS, which nobody scores.
        Positions behind the first visible EOS or PAD are certain, so nothing attends to them.
        """
        x = self.token_embedding(canvas) + self.position_embedding.weight[: canvas.shape[1]]
        if self.time_mlp is not None and t is not None:
            x = x + self.time_mlp(timestep_embedding(t, self.config.d_model))[:, None]
        bias = self.attention_bias(canvas, causal)
        *body, last = self.blocks
        for block in body:
            x = block(x, bias)
        states: Tensor = self.norm(last(x, bias, None if at is None else at - 1))
        return states if at is not None else torch.cat([states[:, :1], states[:, :-1]], dim=1)

    def attention_bias(self, canvas: Tensor, causal: bool) -> Tensor:
        """By distance, and −inf where nobody looks; in the type of autocast.  canvas (B, L) → (B or 1, H, L, L)"""
        device, longest, length = canvas.device.type, self.config.canvas_len, canvas.shape[1]
        # Windows, not a lookup of L² distances, whose gradient is summed by several threads in no fixed order.
        windows = self.relative_bias[:, longest - length : longest + length - 1].unfold(1, length, 1)
        bias = RELATIVE_UNIT * windows.flip(1)  # (H, L, L)
        position = torch.arange(length, device=canvas.device)
        last_seen = position[:, None] if causal else first_end(canvas)[:, None, None, None]
        bias = bias.masked_fill(position > last_seen, -torch.inf)
        return bias.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else bias

    def logits(self, hidden: Tensor, ends_are_impossible: Tensor) -> Tensor:
        """Float32 scores, −inf where a token cannot stand: MASK, BOS; EOS and PAD left of visible text.

        hidden (N, D), ends_are_impossible (N,) bool → (N, V)
        """
        control, text = self.head(hidden).float().tensor_split([FIRST_TEXT_ID], dim=1)
        never = self.never_control[ends_are_impossible.long()]  # (N, FIRST_TEXT_ID)
        return torch.cat([control.masked_fill(never, -torch.inf), text], dim=1)


def count_parameters(config: ModelConfig) -> int:
    """Number of trained values, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in Denoiser(config).parameters())


def main() -> None:
    """Print the table of configurations."""
    print(f"{'name':8} {'d_model':>7} {'layers':>6} {'heads':>5} {'vocabulary':>10} {'canvas':>6} {'parameters':>12}")
    for c in CONFIGS.values():
        shape = f"{c.name:8} {c.d_model:7} {c.layers:6} {c.heads:5} {c.vocab_size:10} {c.canvas_len:6}"
        print(f"{shape} {count_parameters(c):12,}")
