"""Train a model: `python -m host.train` alone trains `small` on TinyStories, preparing the data when missing.

A run is a folder: last.safetensors (resume from here), best.safetensors (lowest validation loss), log.csv,
curves.png and the tokenizer.
"""

import math
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from host.batches import MicroBatch, micro_batches
from host.checkpoint import (
    BEST,
    LAST,
    Progress,
    find_checkpoint,
    init_from,
    read_progress,
    restore,
    save_checkpoint,
)
from host.diffusion import autoregressive_sums, counted_tokens, nelbo_sums
from host.model import Denoiser
from host.optim import Ema, build_optimizers, learning_rate_factor
from host.plots import plot_curves
from host.progress import LOG_COLUMNS, LOG_FILE, open_log, progress_bar, start_wandb
from host.runs import TrainConfig, new_run, parse_arguments, resumed_run
from host.shards import DataFolder
from shared.errors import DataError, DiffusionLLMError, run_main
from shared.schedule import ScheduleName

VALIDATION_SEED = 0x5EED


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
            micro_batches(self.data.train, c.seed, self.progress.step, c.batch_size, c.micro_size, self.batch_schedule)
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
        self._check_finite("loss", loss)
        if not self.scaler.is_enabled():  # a scaler meets infinite gradients now and then, and skips the step
            self._check_finite("gradient norm", norm)
        factor = learning_rate_factor(self.fraction_done(), c.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = c.lr * factor
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.ema.update(self.model, self.progress.step)
        return loss, norm, tokens

    def _check_finite(self, name: str, value: float) -> None:
        if math.isfinite(value):
            return
        last = self.config.out / LAST
        good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been saved yet"
        raise NonFiniteLoss(f"the {name} became {value} at step {self.progress.step}; {good}; try a lower --lr")

    def fraction_done(self) -> float:
        """Part of the run behind us, by time when --minutes was given."""
        if self.config.minutes is not None:
            return min(1.0, self.progress.seconds / (60 * self.config.minutes))
        return min(1.0, self.progress.step / self.config.steps)

    @torch.no_grad()
    def validate(self) -> float:
        """Averaged weights on two samples of validation stories, in nats a token; always the same ones and noise."""
        raw = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.model.load_state_dict(self.ema.shadow)
        n = min(self.config.valid_stories, len(self.data.valid))
        total, tokens = 0.0, 0
        for draw in range(2):
            for batch in micro_batches(
                self.data.valid, VALIDATION_SEED, draw, n, self.config.micro_size, self.batch_schedule
            ):
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
                row: tuple[int | str, ...] = (
                       self.progress.step, self.progress.tokens_seen, f"{self.progress.seconds:.1f}", f"{loss:.4f}",
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
        self._check_finite("validation loss", valid)  # before broken weights replace the last good ones
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


def main() -> None:
    """Train, resume, and save on Ctrl-C."""
    args = parse_arguments()
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
