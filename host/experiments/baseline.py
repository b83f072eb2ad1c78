"""The baseline: `host.bench train` times it beside ours, `host.compare` shows its learning curve.

A masked diffusion model as one would first write it in PyTorch: nn.MultiheadAttention, dropout, logits of every
position, float32, canvases of full length, AdamW, plain cross-entropy on masked positions. `python -m host.baseline`
trains it and keeps its log, no weights.
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from host.data.shards import DataFolder, load_data
from host.device import best_device, work_clock
from host.files import check_numbers
from host.model.diffusion import corrupt, counted_tokens, low_discrepancy_times
from host.model.network import CONFIGS, ModelConfig, config_named, timestep_embedding
from host.train.arguments import AT_MOST
from host.train.batches import MicroBatch, make_batch, story_indices
from host.train.logging import LOG_FILE, LogRow, open_log, progress_bar
from host.train.objectives import Settings
from host.train.optim import PEAK_RATES, learning_rate_factor
from host.train.plots import plot_curves
from host.train.run_folder import (
    VALID_EVERY,
    VALIDATION_DRAWS,
    VALIDATION_SEED,
    TrainConfig,
    fresh_folder,
    write_config,
)
from shared.errors import ConfigError, DiffusionLLMError
from shared.tokens import PAD

DROPOUT: Final = 0.1
ROWS: Final = 16  # of a step


class BaselineBlock(nn.Module):
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


class Baseline(nn.Module):
    """The widths and depths of `host.model.Denoiser`, and its parameters but for the relative position bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.tokens, self.positions = nn.Embedding(config.vocab_size, d), nn.Embedding(config.canvas_len, d)
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.blocks = nn.Sequential(*(BaselineBlock(d, config.heads) for _ in range(config.layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, config.vocab_size)

    def forward(self, canvas: Tensor, t: Tensor) -> Tensor:
        """canvas (B, L), t (B,) → (B, L, V)"""
        x = self.tokens(canvas) + self.positions.weight + self.time(timestep_embedding(t, self.config.d_model))[:, None]
        scores: Tensor = self.head(self.norm(self.blocks(x)))
        return scores


class BaselineLoop:
    """Owns the network and its optimizer, and makes its own batches."""

    def __init__(self, model: ModelConfig, data: DataFolder, device: torch.device, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.data, self.device, self.seed = data, device, seed
        self.model = Baseline(model).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=PEAK_RATES["adamw"])
        self.noise = np.random.default_rng(seed)

    def step(self, number: int) -> tuple[float, float, int]:
        """One optimizer step.  → (cross-entropy of a masked token, in nats, gradient norm, tokens)"""
        rows = self.data.train.take(story_indices(self.seed, number, ROWS, len(self.data.train)))
        x0 = torch.from_numpy(rows.astype(np.int64))
        t = low_discrepancy_times(ROWS, float(self.noise.random()))
        xt = corrupt(x0, torch.from_numpy(self.noise.random(x0.shape, dtype=np.float32)), t, "linear").xt
        target = torch.where(xt != x0, x0, -100).to(self.device)
        scores = self.model(xt.to(self.device), torch.tensor(t, device=self.device))
        loss = F.cross_entropy(scores.flatten(0, 1), target.flatten(), ignore_index=-100)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach()), float(norm), int(counted_tokens(x0).sum())

    @torch.no_grad()
    def nelbo(self, stories: int) -> float:
        """NELBO in nats per token, on the validation stories and noise of `host.train`."""
        self.model.eval()
        nats, tokens = 0.0, 0
        for draw in range(VALIDATION_DRAWS):
            batch = make_batch(
                self.data.valid,
                draw,
                seed=VALIDATION_SEED,
                batch_size=stories,
                micro_size=ROWS,
                mixture={"canvas": 1.0},
                settings=Settings(weighting="nelbo"),
            )
            nats += sum(float(self._nats(part)) for part in batch.parts)
            tokens += batch.tokens
        self.model.train()
        return nats / tokens

    def _nats(self, part: MicroBatch) -> Tensor:
        part = part.on(self.device)
        canvas = part.rows.tokens
        length = canvas.shape[1]
        whole = F.pad(canvas, (0, self.model.config.canvas_len - length), value=PAD)
        scores = self.model(whole, part.t)[:, :length].flatten(0, 1)[part.at + 1]  # rows score the next position
        return (F.cross_entropy(scores, part.target, reduction="none") * part.weight).sum()


def train(config: TrainConfig, model: ModelConfig, data: DataFolder) -> None:
    """Train for `config.steps` steps with host.train's rates; write log.csv and curves.png."""
    loop = BaselineLoop(model, data, best_device(), config.seed)
    stories, work_s = min(config.valid_stories, len(data.valid)), work_clock(loop.device)
    every = config.valid_every or VALID_EVERY
    tokens, seconds, compute_s = 0, 0.0, 0.0
    with open_log(config.out / LOG_FILE, 0) as log, progress_bar(config.steps, None) as bar:
        for number in range(config.steps):
            rate = config.lr * learning_rate_factor(number / config.steps, config.warmup)
            loop.optimizer.param_groups[0]["lr"] = rate
            started, worked = time.perf_counter(), work_s()
            loss, norm, of_step = loop.step(number)
            if not math.isfinite(loss):
                raise DiffusionLLMError(f"the loss became {loss} at step {number}; try a lower --lr")
            elapsed = time.perf_counter() - started
            tokens, seconds = tokens + of_step, seconds + elapsed
            compute_s += work_s() - worked
            step = number + 1
            valid = loop.nelbo(stories) if step % every == 0 or step == config.steps else None
            row = LogRow(
                step=step,
                tokens=tokens,
                seconds=seconds,
                loss=loss,
                valid=valid,
                lr=rate,
                grad_norm=norm,
                tokens_per_s=of_step / elapsed,
                compute_s=compute_s,
            )
            log(row)
            bar(row)
        plot_curves(config.out)


def main() -> None:
    """Train the baseline."""
    parser = argparse.ArgumentParser(
        prog="python -m host.baseline",
        description="Train the baseline that host.compare sets beside a run: plain PyTorch, float32, AdamW.",
        epilog="example: python -m host.baseline --data data/tinystories --steps 3000 --out runs/baseline",
    )
    parser.add_argument("--config", choices=list(CONFIGS), default="tiny", help="model shape (default: %(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="prepared data")
    parser.add_argument("--out", type=Path, required=True, help="run folder; holds a log and its curves, no weights")
    parser.add_argument("--steps", type=int, required=True, help=f"optimizer steps of {ROWS} canvases")
    parser.add_argument(
        "--lr", type=float, default=PEAK_RATES["adamw"], help="peak learning rate (default: %(default)s)"
    )
    parser.add_argument("--valid-every", type=int, default=VALID_EVERY, help="steps (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=TrainConfig.seed, help="of weights and batches (default: %(default)s)"
    )
    args = parser.parse_args()
    check_numbers(args, AT_MOST)
    if args.out.exists():
        raise ConfigError(f"{args.out} exists: choose another --out")
    data = load_data(args.data, verify=True)
    config = TrainConfig(
        args.out,
        args.data,
        args.steps,
        batch_size=ROWS,
        micro_size=ROWS,
        optimizer="adamw",
        lr=args.lr,
        valid_every=args.valid_every,
        seed=args.seed,
        data_sha256=data.meta.sha256,
    )
    with fresh_folder(args.out):
        write_config(config, data.tokenizer_path)
        train(config, replace(config_named(args.config), vocab_size=data.meta.vocab_size), data)
