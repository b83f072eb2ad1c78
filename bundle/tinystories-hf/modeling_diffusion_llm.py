"""A small language model that writes left to right and fills masked canvases. Loads with `trust_remote_code=True`.

The file needs torch and transformers alone. B: batch, N: rows, S: cached rows, L: canvas length, D: width, H: heads,
V: vocabulary. A text is BOS, tokens, EOS; the row at position p scores the token of position p + 1.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

PAD, BOS, EOS, MASK, FIRST_TEXT_ID = 0, 1, 2, 3, 4
RELATIVE_UNIT, BIAS_FLOOR = 10.0, -60.0  # scores per unit of the stored bias; the least bias, in scores
DRAFT_HIDDEN = 512
DRAFT_TOKENS = 1024  # that a draft is one of
NEVER_NEXT = (True, True, False, True)  # PAD, BOS, EOS, MASK: what left to right cannot come next
NEVER_MASKED = (False, True, False, True)  # what no masked position can hold


class DiffusionLLMConfig(PretrainedConfig):
    """Shape of a network. draft_depth: drafts of the chain drafter, 0 without one; training: what made the weights."""

    model_type = "diffusion_llm"
    attribute_map = {  # noqa: RUF012  (as transformers declares it)
        "hidden_size": "d_model",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "canvas_len",
    }

    def __init__(
        self,
        *,
        vocab_size: int = 4096,
        d_model: int = 256,
        layers: int = 4,
        heads: int = 4,
        canvas_len: int = 256,
        time_input: bool = False,
        draft_depth: int = 0,
        training: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        self.vocab_size, self.d_model, self.layers, self.heads = vocab_size, d_model, layers, heads
        self.canvas_len, self.time_input, self.draft_depth = canvas_len, time_input, draft_depth
        self.training = training
        ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": False}
        super().__init__(**{**ids, **others})


class Block(nn.Module):
    """Attention and feed-forward, each after a LayerNorm and added to the residual stream."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.attention_out = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)

    def forward(self, x: Tensor, bias: Tensor, cache: DynamicCache | None, layer: int) -> Tensor:
        """x (B, N, D), bias (B, H, N, S + N) → (B, N, D)"""
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.update(k, v, layer)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(b, n, d)
        x = x + self.attention_out(mixed)
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class DraftStep(nn.Module):
    """One draft's update of the state of the last row, by the token before the draft."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm_state, self.norm_token = nn.LayerNorm(d), nn.LayerNorm(d)
        self.up = nn.Linear(2 * d, DRAFT_HIDDEN)
        self.down = nn.Linear(DRAFT_HIDDEN, d)

    def forward(self, state: Tensor, embedding: Tensor) -> Tensor:
        """(B, D), (B, D) → (B, D)"""
        both = torch.cat([self.norm_state(state), self.norm_token(embedding)], -1)
        changed: Tensor = state + self.down(F.gelu(self.up(both)))
        return changed


class Chain(nn.Module):
    """The drafter: a step for each depth. likely (F,): ids that a draft can be."""

    def __init__(self, d: int, depth: int, vocab_size: int) -> None:
        super().__init__()
        self.likely: Tensor
        self.register_buffer("likely", torch.arange(max(0, vocab_size - DRAFT_TOKENS), vocab_size))
        self.depths = nn.ModuleList(DraftStep(d) for _ in range(depth))


class DiffusionLLMForCausalLM(PreTrainedModel, GenerationMixin):
    """`forward` and `generate`: text left to right. `canvas_logits`: masked tokens anywhere. `drafts`: tokens ahead."""

    config_class = DiffusionLLMConfig
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (as transformers declares it)

    def __init__(self, config: DiffusionLLMConfig) -> None:
        super().__init__(config)
        d = config.d_model
        self.token_embedding = nn.Embedding(config.vocab_size, d)
        self.position_embedding = nn.Embedding(config.canvas_len, d)
        self.relative_bias = nn.Parameter(torch.zeros(config.heads, 2 * config.canvas_len - 1))
        self.time_mlp = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d)) if config.time_input else None
        self.blocks = nn.ModuleList(Block(d, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, config.vocab_size)
        self.drafter = Chain(d, config.draft_depth, config.vocab_size) if config.draft_depth else None
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.token_embedding

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """The law left to right. attention_mask (B, S + N): 0 at padding, which takes no position.

        past_key_values: the cache's name in older releases of transformers. labels: as input_ids, −100 where none
        counts. logits_to_keep: only of the last rows.
        """
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        b, n = input_ids.shape
        total = n + (0 if cache is None else cache.get_seq_length())
        if total > self.config.canvas_len:
            raise ValueError(f"{total} tokens are more than the {self.config.canvas_len} positions of this model")
        real = input_ids.new_ones(b, total) if attention_mask is None else attention_mask
        if real.shape != (b, total):
            raise ValueError(f"attention_mask must have the shape {(b, total)}, not {tuple(real.shape)}")
        keys = (real.cumsum(1) - 1).clamp(min=0)
        order = torch.arange(total, device=input_ids.device)
        itself = order == order[-n:, None]  # padding sees itself, for numbers that are finite
        visible = (order <= order[-n:, None]) & (real.bool()[:, None] | itself)
        states = self._states(input_ids, keys[:, -n:], keys=keys, visible=visible, cache=cache)
        logits = self._logits(states[:, -logits_to_keep:], torch.tensor(NEVER_NEXT))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss, logits, cache)  # by place: the cache's name depends on the release

    @torch.no_grad()
    def canvas_logits(self, canvas: Tensor, t: Tensor | None = None) -> Tensor:
        """Scores of every position of a canvas, of which some hold MASK: BOS, text and masks, EOS, PAD.

        t (B,): fraction of masked text, for a model with `time_input`.  (B, L) → (B, L, V), the token of each position
        """
        place = torch.arange(canvas.shape[1], device=canvas.device)
        ended = (canvas == EOS) | (canvas == PAD)
        end = torch.where(ended, place, canvas.shape[1]).amin(1)
        visible = (place <= end[:, None])[:, None].expand(-1, len(place), -1)
        states = self._states(canvas, place[None], keys=place[None], visible=visible, t=t)
        states = torch.cat([states[:, :1], states[:, :-1]], 1)
        last_text = torch.where(canvas >= FIRST_TEXT_ID, place, -1).amax(1)
        no_end = (place < last_text[:, None])[..., None]  # left of visible text stands neither EOS nor PAD
        return self._logits(states, no_end | torch.tensor(NEVER_MASKED, device=canvas.device))

    @torch.no_grad()
    def drafts(self, input_ids: Tensor) -> Tensor:
        """The likeliest tokens after `input_ids` (B, N), N at least 2, by the drafter alone.  → (B, draft_depth)"""
        if self.drafter is None:
            raise ValueError("this model has no drafter")
        n = input_ids.shape[1] - 1
        place = torch.arange(n, device=input_ids.device)[None]
        visible = (place <= place[0, :, None])[None]
        state = self._states(input_ids[:, :-1], place, keys=place, visible=visible)[:, -1]
        token, drafts = input_ids[:, -1], []
        for step in self.drafter.depths:
            state = step(state, self.token_embedding(token))
            scores = self._logits(state, torch.tensor(NEVER_NEXT))
            token = self.drafter.likely[scores[:, self.drafter.likely].argmax(-1)]
            drafts.append(token)
        return torch.stack(drafts, 1)

    def _states(
        self,
        tokens: Tensor,
        positions: Tensor,
        *,
        keys: Tensor,
        visible: Tensor,
        cache: DynamicCache | None = None,
        t: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, N), visible (B or 1, N, S + N), positions (B or 1, N), keys: theirs (B or 1, S + N) → (B, N, D)"""
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        if self.time_mlp is not None and t is not None:
            half = self.config.d_model // 2
            rate = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
            phase = 1000.0 * t.float()[:, None] * rate
            x = x + self.time_mlp(torch.cat([phase.sin(), phase.cos()], 1).to(x.dtype))[:, None]
        table = (RELATIVE_UNIT * self.relative_bias).clamp(min=BIAS_FLOOR)
        distance = keys[:, None] - positions[..., None] + self.config.canvas_len - 1
        bias = table[:, distance].transpose(0, 1).masked_fill(~visible[:, None], -torch.inf)
        for layer, block in enumerate(self.blocks):
            x = block(x, bias, cache, layer)
        states: Tensor = self.norm(x)
        return states

    def _logits(self, states: Tensor, never: Tensor) -> Tensor:
        """Float32 scores; −inf for the control tokens (PAD, BOS, EOS, MASK) that are `never` (..., 4) possible."""
        control, text = self.head(states).float().tensor_split([FIRST_TEXT_ID], dim=-1)
        return torch.cat([control.masked_fill(never.to(control.device), -torch.inf), text], -1)
