"""Train a model: `python -m host.train` alone trains `small` on TinyStories, preparing the data when missing.

A run is a folder: last.safetensors (resume from here), best.safetensors (lowest validation loss), log.csv,
curves.png and the tokenizer.
"""

import argparse
import math
import shutil
import signal
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from host.batches import MicroBatch, micro_batches
from host.checkpoint import (
    BEST,
    LAST,
    Objective,
    Progress,
    find_checkpoint,
    init_from,
    read_progress,
    restore,
    save_checkpoint,
)
from host.data import DEFAULT_OUT, DEFAULT_SOURCE, prepare
from host.diffusion import autoregressive_sums, counted_tokens, nelbo_sums
from host.model import CONFIGS, Denoiser, config_named
from host.optim import Ema, OptimizerName, build_optimizers, learning_rate_factor
from host.plots import plot_curves
from host.progress import LOG_COLUMNS, LOG_FILE, open_log, progress_bar, start_wandb
from host.shards import DataFolder, load_data
from shared.errors import ConfigError, DataError, DiffusionLLMError, run_main
from shared.manifest import TOKENIZER
from shared.schedule import ScheduleName

CONFIG_FILE = "config.json"
VALIDATION_SEED = 0x5EED


@dataclass(frozen=True)
class TrainConfig:
    """What a run does besides the model's shape. minutes, when given, ends the run and sets the decay's length."""

    out: Path
    data: Path
    steps: int = 20_000
    minutes: float | None = None
    batch_size: int = 64
    micro_size: int = 32
    optimizer: OptimizerName = "adamw"
    lr: float = 1e-3
    warmup: float = 0.03  # part of the run
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    valid_every: int = 500  # steps; also how often a checkpoint is saved
    valid_stories: int = 256
    seed: int = 0


class NonFiniteLoss(DiffusionLLMError):
    """Training diverged."""


class Trainer:
    """Owns the network, its optimizers and the run folder; `run` trains until done or interrupted."""

    def __init__(
        self, config: TrainConfig, progress: Progress, data: DataFolder, device: torch.device, wandb: bool = False
    ) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.progress = progress
        self.data = data
        self.device = device
        self.model = Denoiser(progress.model).to(device)
        self.optimizers = build_optimizers(self.model, config.optimizer, config.lr)
        self.ema = Ema(self.model, config.ema_decay)
        self.dtype = mixed_precision_dtype(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.stopping = False
        self.wandb = start_wandb(config.out.name, {"lr": config.lr}) if wandb else None

    def resume(self) -> None:
        """Take up the run folder's last checkpoint."""
        last = find_checkpoint(self.config.out, LAST)
        self.progress = restore(last, self.model, self.ema, self.optimizers, self.scaler)

    def start_from(self, run: Path) -> None:
        """Start from another run's averaged weights."""
        path = find_checkpoint(run)
        theirs = read_progress(path)
        if theirs.tokenizer_sha256 != self.progress.tokenizer_sha256:
            raise DataError(f"{run} was trained with another tokenizer than {self.config.data}")
        init_from(self.model, path)
        self.ema = Ema(self.model, self.config.ema_decay)

    def row_losses(self, batch: MicroBatch) -> Tensor:
        """Each row's loss in nats: NELBO draw or exact negative log-likelihood.  → (B,)"""
        x0 = batch.x0.to(self.device)
        if batch.corrupted is None:
            return autoregressive_sums(self.model, x0)
        corrupted = replace(
            batch.corrupted, xt=batch.corrupted.xt.to(self.device), scored=batch.corrupted.scored.to(self.device)
        )
        return nelbo_sums(self.model, corrupted, x0, batch.t, self.progress.schedule)

    @property
    def batch_schedule(self) -> ScheduleName | None:
        """None makes clean batches, for the autoregressive objective."""
        return self.progress.schedule if self.progress.objective == "diffusion" else None

    def step(self) -> tuple[float, float, int]:
        """One optimizer step.  → (loss in nats a token, gradient norm, tokens)"""
        c = self.config
        batches = list(
            micro_batches(
                self.data.train, c.seed, self.progress.step, c.batch_size, c.micro_size, self.batch_schedule
            )
        )
        tokens = sum(int(counted_tokens(b.x0).sum()) for b in batches)
        loss = 0.0
        for batch in batches:
            with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
                part = self.row_losses(batch).sum() / tokens
            self.scaler.scale(part).backward()
            loss += float(part.detach())
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip_norm))
        self._check_finite(loss)
        factor = learning_rate_factor(self.fraction_done(), c.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = c.lr * factor
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.ema.update(self.model, self.progress.step)
        return loss, norm, tokens

    def _check_finite(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        last = self.config.out / LAST
        good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been saved yet"
        raise NonFiniteLoss(f"the loss became {loss} at step {self.progress.step}; {good}; try a lower --lr")

    def fraction_done(self) -> float:
        """Part of the run behind us, by time when --minutes was given."""
        if self.config.minutes is not None:
            return min(1.0, self.progress.seconds / (60 * self.config.minutes))
        return min(1.0, self.progress.step / self.config.steps)

    @torch.no_grad()
    def validate(self) -> float:
        """Averaged weights on the first validation stories, in nats a token; the same noise every time."""
        raw = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.model.load_state_dict(self.ema.shadow)
        n = min(self.config.valid_stories, len(self.data.valid))
        total, tokens = 0.0, 0
        for draw in range(2):
            for batch in micro_batches(self.data.valid, VALIDATION_SEED, draw, n, self.config.micro_size, self.batch_schedule):
                total += float(self.row_losses(batch).sum())
                tokens += int(counted_tokens(batch.x0).sum())
        self.model.load_state_dict(raw)
        return total / tokens

    def save(self, file: str) -> None:
        """Write a checkpoint into the run folder, atomically."""
        path = self.config.out / file
        save_checkpoint(path, self.progress, self.model, self.ema, self.optimizers, self.scaler)

    def run(self) -> None:
        """Train to the end, or until `stopping` is set; either way the last state is saved."""
        c = self.config
        minutes_total = None if c.minutes is None else 60 * c.minutes
        with (
            open_log(c.out / LOG_FILE, self.progress.step) as log,
            progress_bar(c.steps, minutes_total) as bar,
        ):
            while not self.stopping and self.fraction_done() < 1.0:
                started = time.perf_counter()
                loss, norm, tokens = self.step()
                elapsed = time.perf_counter() - started
                p = self.progress
                self.progress = replace(
                    p, step=p.step + 1, tokens_seen=p.tokens_seen + tokens, seconds=p.seconds + elapsed
                )
                due = self.progress.step % c.valid_every == 0 or self.fraction_done() >= 1.0
                valid = self.validate_and_save() if due else None
                row = (self.progress.step, self.progress.tokens_seen, f"{self.progress.seconds:.1f}", f"{loss:.4f}",
                       "" if valid is None else f"{valid:.4f}", f"{self.optimizers[0].param_groups[0]['lr']:.2e}",
                       f"{norm:.3f}", f"{tokens / elapsed:.0f}")  # fmt: skip
                log(row)
                if self.wandb is not None:
                    self.wandb({k: float(v) for k, v in zip(LOG_COLUMNS, row, strict=True) if v != ""})
                bar(self.progress.step, self.progress.seconds, loss, valid, tokens / elapsed)
        self.save(LAST)
        plot_curves(c.out)

    def validate_and_save(self) -> float:
        """Validate, keep the best apart, save the last, redraw the curves."""
        valid = self.validate()
        if self.progress.best_nats is None or valid < self.progress.best_nats:
            self.progress = replace(self.progress, best_nats=valid)
            self.save(BEST)
        self.save(LAST)
        plot_curves(self.config.out)
        return valid


def mixed_precision_dtype(device: torch.device) -> torch.dtype | None:
    """bf16 where the chip multiplies it, FP16 on older GPUs, None (float32) on CPUs that would emulate it."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else None


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m host.train",
        description="Train a masked diffusion language model (or the autoregressive baseline).",
        epilog="example: python -m host.train --config tiny --minutes 60; continue it with --resume runs/NAME",
    )
    parser.add_argument("--config", choices=list(CONFIGS), default="small", help="model shape (default: small)")
    parser.add_argument("--data", type=Path, default=DEFAULT_OUT, help=f"data folder (default: {DEFAULT_OUT})")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/CONFIG-DATE-TIME)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue this run with its own settings")
    parser.add_argument("--init", type=Path, metavar="RUN", help="start from the weights of another run")
    parser.add_argument("--steps", type=int, help=f"optimizer steps in all (default: {TrainConfig.steps})")
    parser.add_argument("--minutes", type=float, help="train for so long in all, instead of --steps")
    parser.add_argument("--objective", choices=["diffusion", "ar"], default="diffusion")
    parser.add_argument("--schedule", choices=["linear", "cosine"], default="linear", help="training noise schedule")
    parser.add_argument("--no-time-input", action="store_true", help="let the network read the time off the canvas")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default=TrainConfig.optimizer)
    parser.add_argument("--lr", type=float, default=TrainConfig.lr, help="peak learning rate")
    parser.add_argument("--batch-size", type=int, default=TrainConfig.batch_size, help="canvases in a step")
    parser.add_argument("--micro-size", type=int, default=TrainConfig.micro_size, help="canvases in a pass")
    parser.add_argument("--valid-every", type=int, default=TrainConfig.valid_every, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--wandb", action="store_true", help="also log to Weights & Biases")
    return parser.parse_args()


def new_run(args: argparse.Namespace) -> tuple[TrainConfig, Progress, DataFolder]:
    """Prepare the data when the default folder is missing, and lay out a fresh run folder."""
    if args.data == DEFAULT_OUT and not args.data.exists():
        prepare(DEFAULT_SOURCE, args.data)
    data = load_data(args.data)
    out = args.out or Path("runs") / f"{args.config}-{datetime.now():%Y%m%d-%H%M%S}"
    if (out / LAST).exists():
        raise ConfigError(f"{out} already holds a run: continue it with --resume {out}, or choose another --out")
    config = TrainConfig(
        out=out,
        data=args.data,
        steps=args.steps or TrainConfig.steps,
        minutes=args.minutes,
        batch_size=args.batch_size,
        micro_size=args.micro_size,
        optimizer=args.optimizer,
        lr=args.lr,
        valid_every=args.valid_every,
        seed=args.seed,
    )
    model = replace(
        config_named(args.config),
        vocab_size=data.meta.vocab_size,
        time_input=not (args.no_time_input or args.objective == "ar"),
    )
    progress = Progress(
        model=model,
        objective=args.objective,
        schedule=args.schedule,
        tokenizer_sha256=data.meta.tokenizer_sha256,
        data_source=data.meta.source,
        data_licence=data.meta.licence,
        data_stories=len(data.train),
    )
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data.tokenizer_path, out / TOKENIZER)
    (out / CONFIG_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(config, enc_hook=str)))
    return config, progress, data


def read_config(run: Path) -> TrainConfig:
    """The settings a run was started with."""
    try:
        return msgspec.json.decode(
            (run / CONFIG_FILE).read_bytes(), type=TrainConfig, dec_hook=lambda kind, value: kind(value)
        )
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{run / CONFIG_FILE} cannot be read: {error}") from None


def resumed_run(args: argparse.Namespace) -> tuple[TrainConfig, Progress, DataFolder]:
    """The settings and progress of an earlier run; only its length may change."""
    last = find_checkpoint(args.resume, LAST)
    progress = read_progress(last)
    config = replace(read_config(args.resume), out=args.resume)
    if args.steps is not None or args.minutes is not None:
        config = replace(config, steps=args.steps or config.steps, minutes=args.minutes)
    data = load_data(config.data)
    if data.meta.tokenizer_sha256 != progress.tokenizer_sha256:
        raise DataError(f"{config.data} has another tokenizer than the run {args.resume}: prepare its data again")
    return config, progress, data


def main() -> None:
    """Train, resume, and save on Ctrl-C."""
    args = parse_arguments()
    for name in ("steps", "minutes", "batch_size", "micro_size", "valid_every", "lr"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    config, progress, data = resumed_run(args) if args.resume else new_run(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(config, progress, data, device, wandb=args.wandb)
    if args.resume:
        trainer.resume()
    elif args.init:
        trainer.start_from(args.init)

    def stop(signum: int, frame: object) -> None:
        trainer.stopping = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    trainer.run()
    state = f"stopped at step {trainer.progress.step}; continue with --resume {config.out}"
    best = trainer.progress.best_nats
    print(f"{config.out}: {state if trainer.stopping else 'done'}; best validation loss "
          f"{'not measured yet' if best is None else f'{best:.4f} nats a token'}")  # fmt: skip


if __name__ == "__main__":
    run_main(main)
