"""The network: a pre-norm transformer over rows, each a token at a position that sees some of the others.

`python -m host.model` prints the configurations. B: batch, N: rows, S: cached rows, L: canvas length, D: width,
H: heads, V: vocabulary. Who sees whom is decided in `host.model.layouts`.
"""

import math
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from host.model.block import Block
from host.model.conditions import Conditions, Given, Memory
from host.model.drafter import Chain
from host.model.layouts import canvas as canvas_layout
from shared.errors import ConfigError
from shared.tokens import BOS, CANVAS_LEN, EOS, FIRST_TEXT_ID, MASK, PAD

RELATIVE_UNIT: Final = 10.0
"""Scores per unit of the stored relative bias: an optimizer step moves a bias ten times as far as a weight."""
BIAS_FLOOR: Final = -60.0
"""Least relative bias, in scores: e^-60 vanishes beside 1 in float32, and much smaller probabilities are denormal
numbers, which double the time of a step on Intel processors."""
ANY_END, NO_END, NO_PADDING = 0, 1, 2
"""Which control tokens a row may score: EOS and PAD; neither, as left of visible text; EOS only, as left to right."""


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
    draft_depth: int = 0  # drafts of the chain drafter; 0: there is none
    conditions: bool = False  # whether it takes words and pictures


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


def ends_impossible(canvas: Tensor) -> Tensor:
    """True left of a visible text token, where neither EOS nor PAD can stand.  (B, L) → (B, L)"""
    position = torch.arange(canvas.shape[1], device=canvas.device)
    last_text = torch.where(canvas >= FIRST_TEXT_ID, position, -1).amax(1)
    return position < last_text[:, None]


def without(scores: Tensor, never: Tensor) -> Tensor:
    """Scores (N, V), −inf where a control token cannot stand.  never (N, FIRST_TEXT_ID) bool, or one row for all"""
    control, text = scores.tensor_split([FIRST_TEXT_ID], dim=1)
    return torch.cat([control.masked_fill(never, -torch.inf), text], dim=1)


def timestep_embedding(t: Tensor, d_model: int) -> Tensor:
    """Sinusoids of 1000·t, always float32: in low precision the phase is lost.  (B,) → (B, D)"""
    half = d_model // 2
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    phase = 1000.0 * t.float()[:, None] * frequency
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def first_relative_bias(config: ModelConfig) -> Tensor:
    """Initial bias on the score of a key at distance j − i, in column j − i + L − 1.  → (H, 2·L − 1)

    −slope · |j − i| with slopes falling from 1 over the heads, 0 for the last (Press et al., ALiBi, arXiv 2108.12409).
    Trained from there, shared by all layers (Raffel et al., T5, arXiv 1910.10683).
    """
    distance = torch.arange(1 - config.canvas_len, config.canvas_len).abs()
    slope = 2.0 ** (-8 * torch.arange(config.heads) / config.heads)
    slope[-1] = 0.0
    return -slope[:, None] * distance / RELATIVE_UNIT


@dataclass
class Cache:
    """Keys and values of the kept rows of each layer, and of the last pass until `keep` is called.

    Keys hold no position, since the bias depends on logical positions; so cached rows are never computed again.
    """

    positions: Tensor  # (B, S)
    keys: list[Tensor]  # of each layer (B, H, S, D/H)
    values: list[Tensor]
    fresh: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of each layer, (B, H, N, D/H)
    fresh_positions: Tensor | None = None  # (B, N)

    @classmethod
    def empty(cls, config: ModelConfig, batch: int = 1, device: torch.device | None = None) -> "Cache":
        """Nothing kept yet."""
        shape = (batch, config.heads, 0, config.d_model // config.heads)
        keys, values = ([torch.zeros(shape, device=device) for _ in range(config.layers)] for _ in range(2))
        return cls(torch.zeros(batch, 0, dtype=torch.long, device=device), keys, values)

    def __len__(self) -> int:
        return self.positions.shape[1]

    def keep(self, rows: Tensor) -> None:
        """Append these rows (M,) of the last pass; the others leave nothing."""
        assert self.fresh_positions is not None
        self.positions = torch.cat([self.positions, self.fresh_positions[:, rows]], 1)
        for layer, (key, value) in enumerate(self.fresh):
            self.keys[layer] = torch.cat([self.keys[layer], key[:, :, rows]], 2)
            self.values[layer] = torch.cat([self.values[layer], value[:, :, rows]], 2)
        self.fresh, self.fresh_positions = [], None


class Denoiser(nn.Module):
    """Scores, for each row, the token of the next position."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.token_embedding = nn.Embedding(config.vocab_size, d)
        self.position_embedding = nn.Embedding(config.canvas_len, d)
        self.relative_bias = nn.Parameter(first_relative_bias(config))
        self.time_mlp = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d)) if config.time_input else None
        self.blocks = nn.ModuleList(Block(d, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, config.vocab_size)
        self.drafter = Chain(d, config.vocab_size, config.draft_depth) if config.draft_depth else None
        self.conditions = Conditions(d, config.heads, config.layers) if config.conditions else None
        never_control = torch.zeros(3, FIRST_TEXT_ID, dtype=torch.bool)  # by ANY_END, NO_END, NO_PADDING
        never_control[:, [MASK, BOS]] = True
        never_control[NO_END, [EOS, PAD]] = True
        never_control[NO_PADDING, PAD] = True
        self.never_control: Tensor
        self.register_buffer("never_control", never_control, persistent=False)
        self.apply(self._init)
        for name, weight in self.named_parameters():
            if name.endswith(("attention_out.weight", "down.weight")):  # two a block end in the residual stream
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers))
        if self.conditions is not None:
            self.conditions.start_silent()

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and what the network takes has to be."""
        return self.relative_bias.device

    def set_dropout(self, probability: float) -> None:
        """Dropout of what each block adds to the residual stream, in training."""
        for block in self.modules():
            if isinstance(block, Block):
                block.dropout = probability

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        visible: Tensor,
        cache: Cache | None = None,
        *,
        at: Tensor | None = None,
        t: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """States from which `logits` scores the token of each row's next position.

        tokens (B, N), positions (B or 1, N), visible (B or 1, N, S + N) bool, the cached rows first; a row that sees
        nothing gets NaN. at (M,): only these rows, counted over the batch. t (B,): diffusion time, if conditioned on
        it. memory: what `remember` made of the texts' conditions. → (B, N, D), or (M, D)

        The LM head is shifted: the row at position p scores the token of position p + 1, in every layout.
        """
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        if self.time_mlp is not None and t is not None:
            x = x + self.time_mlp(timestep_embedding(t, self.config.d_model))[:, None]
        if cache is not None:
            cache.fresh, cache.fresh_positions = [], positions.expand(tokens.shape[0], -1)
        bias = self.attention_bias(positions, visible, None if cache is None else cache.positions)
        for layer, block in enumerate(self.blocks):
            x, fresh = block(
                x,
                bias,
                at=at if layer == len(self.blocks) - 1 else None,
                cached=None if cache is None else (cache.keys[layer], cache.values[layer]),
                read=None if memory is None or self.conditions is None else self.conditions.reader(memory, layer),
            )
            if cache is not None:
                cache.fresh.append(fresh)
        states: Tensor = self.norm(x)
        return states

    def remember(self, given: Given) -> Memory:
        """Encode conditions, each text's words and pictures, into what the blocks read; once a text."""
        assert self.conditions is not None
        return self.conditions.remember(given, self.word_rows(given.tokens))

    def word_rows(self, tokens: Tensor) -> Tensor:
        """Input of the word encoder: each token's embedding and row of the LM head.  (B, R) → (B, R, 2·D)"""
        return torch.cat([self.token_embedding(tokens), nn.functional.embedding(tokens, self.head.weight)], -1)

    def attention_bias(self, positions: Tensor, visible: Tensor, cached: Tensor | None = None) -> Tensor:
        """Relative position bias plus mask (−inf at invisible keys), in the autocast dtype.

        positions (B or 1, N), visible (B or 1, N, S + N), cached: positions (B, S) of the cached keys
        → (B or 1, H, N, S + N)
        """
        device, longest = positions.device.type, self.config.canvas_len
        # Rows and columns are selected whole: the gradient of a lookup of N² distances is summed by several threads in
        # no fixed order, so that runs would not repeat bit for bit.
        windows = self.relative_bias.unfold(1, longest, 1).flip(1)  # (H, L, L)
        table = (RELATIVE_UNIT * windows).clamp(min=BIAS_FLOOR)
        keys = positions if cached is None else torch.cat([cached, positions.expand(len(cached), -1)], 1)
        if torch.compiler.is_compiling():  # in one graph for any number of sequences
            queries = table[:, positions]  # (H, B or 1, N, L)
            columns = keys[None, :, None].expand(*queries.shape[:-1], -1)
            bias = queries.gather(-1, columns).transpose(0, 1)
        else:
            rows = zip(positions.expand(len(keys), -1), keys, strict=True)
            bias = torch.stack([table.index_select(1, query).index_select(2, key) for query, key in rows])
        bias = bias.masked_fill(~visible[:, None], -torch.inf)
        return bias.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else bias

    def score_canvas(self, canvas: Tensor, t: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """States that the tokens of a canvas are read from, for full-canvas diffusion.  canvas (B, L) → (B, L, D)

        at (M,): positions counted over all rows, i·L + j, none of them a BOS.  → (M, D)
        Positions after the first visible EOS or PAD are certain, so nothing attends to them. Position 0 holds BOS,
        which is never scored: its state is that of position 1.
        """
        rows = canvas_layout(canvas)
        states = self(*rows, at=None if at is None else at - 1, t=t)
        return states if at is not None else torch.cat([states[:, :1], states[:, :-1]], dim=1)

    def logits(self, hidden: Tensor, ends: Tensor | int) -> Tensor:
        """Float32 scores, −inf where a token cannot stand: MASK and BOS always, others by `ends`.

        hidden (N, D), ends (N,) or one for all, of ANY_END, NO_END, NO_PADDING; True reads as NO_END → (N, V)
        """
        never = self.never_control[ends if isinstance(ends, int) else ends.long()]
        return without(self.head(hidden).float(), never)

    def draft_logits(self, state: Tensor, ends: Tensor | int) -> Tensor:
        """Scores of a draft, as `logits`, −inf at tokens that cannot be one.  state (N, D) → (N, V)"""
        assert self.drafter is not None
        scores, likely = self.logits(state, ends), self.drafter.likely
        return torch.full_like(scores, -torch.inf).index_copy(1, likely, scores[:, likely])


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
