"""Train a model: `python -m host.train` alone trains `small` on TinyStories, preparing the data when missing.

A run is a folder: last.safetensors (resume from here), best.safetensors (lowest validation loss), log.csv,
curves.png and the tokenizer. `torchrun --nproc-per-node N -m host.train` shares every batch among N processes.
"""

import contextlib
import math
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from host.data.shards import DataFolder, Split, load_data
from host.device import best_device, machine_of, mixed_precision_dtype, torch_gflops, work_clock
from host.model.network import Denoiser
from host.train.batches import Batch, MicroBatch, make_batch
from host.train.checkpoint import BEST, LAST, Progress, find_checkpoint, init_from, restore, save_checkpoint
from host.train.conditioner import conditioner_of
from host.train.distributed import Ranks, joined_ranks, leave
from host.train.flops import batch_gflop
from host.train.launch import laid_out_by_first
from host.train.logging import LOG_FILE, open_log, progress_bar, start_wandb
from host.train.objectives import Settings
from host.train.optim import Ema, build_optimizers, learning_rate_factor
from host.train.plots import plot_curves
from host.train.readings import StepResult, check_finite, log_rows, read, steps_between_readings
from host.train.run_folder import (
    VALIDATION_DRAWS,
    VALIDATION_SEED,
    TrainConfig,
    counted_seconds,
    fraction_done,
    validation_due,
)
from host.train.stages import choose_drafts, freeze, trained_mixture, training_loss

SAVE_EVERY_S: Final = 300.0  # of training, between validations
ROWS_ALIGNED: Final = 16
"""In mixed precision, sequences are padded to multiples of this: CUDA attention with a bias takes multiples of 8, and
half-precision products are fastest so. On a CPU see `host.train.loss.SCORED_ALIGNED`."""


class Trainer:
    """Owns the network, its optimizers and the run folder; `run` trains until done or interrupted."""

    def __init__(
        self,
        config: TrainConfig,
        progress: Progress,
        *,
        data: DataFolder,
        device: torch.device,
        ranks: Ranks = Ranks(),  # noqa: B008  (frozen: alone)
        wandb: bool = False,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.progress = progress
        self.data = data
        self.device = device
        self.ranks = ranks
        (self.dtype,) = ranks.from_first((mixed_precision_dtype(device, progress.cpu_dtype),))
        self.model = Denoiser(progress.model).to(device)
        self.mixture = trained_mixture(config.stage, progress.objectives)
        freeze(self.model, config.stage)
        self.optimizers = build_optimizers(
            self.model,
            config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            muon_dtype=self.dtype or torch.float32,
            compiled=device.type == "cuda",
        )
        self.model.set_dropout(config.dropout)
        self.ema = Ema(self.model, config.ema_decay)
        self.conditioner = conditioner_of(data, config.pictures) if {"conditioned", "shown"} & {*self.mixture} else None
        self.loss = training_loss(self.model, device, ranks, config.stage)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.stopping = False
        self.read_every = steps_between_readings(device)
        self.saved_s = progress.seconds
        self.wandb = start_wandb(config.out.name, {"lr": config.lr}) if wandb and ranks.first else None
        self._preparer = ThreadPoolExecutor(1, "batches")
        self._prepared: dict[int, Future[Batch]] = {}  # by step

    def resume(self) -> None:
        """Load the run folder's last checkpoint."""
        last = find_checkpoint(self.config.out, LAST)
        self.progress = restore(last, self.model, ema=self.ema, optimizers=self.optimizers, scaler=self.scaler)
        self.saved_s = self.progress.seconds

    def start_from(self, run: Path) -> None:
        """Start from another run's EMA weights; `host.train.run_folder.check_start` has checked them."""
        init_from(self.model, find_checkpoint(run))
        if self.config.stage == "drafter":
            choose_drafts(self.model, self.data.train)
        self.ema = Ema(self.model, self.config.ema_decay)

    def batch_at(self, split: Split, seed: int, step: int, size: int) -> Batch:
        """This process's share of a batch, on CUDA in pinned memory."""
        c = self.config
        settings = Settings(self.progress.schedule, "nelbo", conditioner=self.conditioner)
        if split is self.data.train:
            settings = replace(settings, weighting=c.weighting, input_noise=c.input_noise)
        batch = make_batch(
            split,
            step,
            seed=seed,
            batch_size=size,
            micro_size=c.micro_size,
            mixture=self.mixture,
            settings=settings,
            share=(self.ranks.rank, self.ranks.processes),
            length_step=ROWS_ALIGNED if self.dtype is not None else 1,
        )
        if self.device.type == "cpu":
            return batch
        return replace(batch, parts=tuple(part.in_buckets().pinned() for part in batch.parts))

    def next_batch(self) -> Batch:
        """The batch of this step, made during the one before; starts making the next."""
        c, step = self.config, self.progress.step
        made = self._prepared.pop(step, None)
        batch = made.result() if made else self.batch_at(self.data.train, c.seed, step, c.batch_size)
        coming = self._preparer.submit(self.batch_at, self.data.train, c.seed, step + 1, c.batch_size)
        self._prepared = {step + 1: coming}
        return batch

    def summed_loss(self, batch: MicroBatch) -> Tensor:
        """A micro-batch's weighted loss, summed, in nats.  → ()"""
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            loss: Tensor = self.loss(batch.on(self.device))
        return loss

    def step(self) -> StepResult:
        """One optimizer step. Does not wait for the device: nothing of it is read, but for a checkpoint, or in FP16."""
        c = self.config
        batch = self.next_batch()
        total = torch.zeros((), device=self.device)
        for i, part in enumerate(batch.parts):
            with self._gradient_exchange(i == len(batch.parts) - 1):
                loss = self.summed_loss(part) / batch.tokens
                # Gradients are averaged over the processes; the loss is a sum over all stories.
                self.scaler.scale(loss * self.ranks.processes).backward()
            total += loss.detach()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip_norm)
        if self.progress.seconds - self.saved_s > SAVE_EVERY_S:
            check_finite("loss", *self.ranks.sums(float(total)), step=self.progress.step, out=c.out)  # of these weights
            self.save(LAST)
        # In FP16 a step with infinite gradients is skipped; clipping by an infinite norm has spoilt all of them.
        spoilt = self.scaler.is_enabled() and not math.isfinite(norm)
        factor = learning_rate_factor(fraction_done(c, self.progress), c.warmup, c.cool_down)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = c.lr * factor
            if not spoilt:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.ema.update(self.model, self.progress.step)
        return StepResult(total, norm, batch.tokens, c.lr * factor, batch_gflop(self.model.config, batch))

    def steps_unread(self) -> list[StepResult]:
        """Steps up to the next reading: as many as may be under way, or up to a validation or the end."""
        steps: list[StepResult] = []
        while len(steps) < self.read_every:
            before = self.progress
            steps.append(self.step())
            self.progress = replace(before, step=before.step + 1, tokens_seen=before.tokens_seen + steps[-1].tokens)
            done = fraction_done(self.config, self.progress) >= 1.0
            if done or validation_due(self.config, before, self.progress):
                break
        return steps

    def checked(self, steps: Sequence[StepResult], first: int) -> tuple[list[float], list[float]]:
        """Losses over all processes and gradient norms of these steps, the first of that number; all are finite.

        Raises NonFiniteLoss. A scaler skips steps with infinite gradients.
        """
        losses, norms = read(steps)
        losses = self.ranks.sums(*losses)
        for number, (loss, norm) in enumerate(zip(losses, norms, strict=True), first):
            check_finite("loss", loss, step=number, out=self.config.out)
            if not self.scaler.is_enabled():
                check_finite("gradient norm", norm, step=number, out=self.config.out)
        return losses, norms

    def _gradient_exchange(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Processes exchange gradients once a step, in its last backward pass."""
        exchanged = last or self.ranks.processes == 1
        return contextlib.nullcontext() if exchanged else self.loss.no_sync()  # type: ignore[operator]

    @torch.no_grad()
    def validate(self) -> float:
        """Nats per token of the EMA weights on two samples of validation stories, with the same noise every time."""
        raw = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema.shadow)
        self.model.eval()  # no dropout
        n = min(self.config.valid_stories, len(self.data.valid))
        nats, tokens = 0.0, 0
        for draw in range(VALIDATION_DRAWS):
            batch = self.batch_at(self.data.valid, VALIDATION_SEED, draw, n)
            nats += sum(float(self.summed_loss(part)) for part in batch.parts)
            tokens += batch.tokens
        self.model.load_state_dict(raw)
        self.model.train()
        (total,) = self.ranks.sums(nats)
        return total / tokens

    def save(self, file: str) -> None:
        """Write a checkpoint into the run folder, on the first process."""
        self.saved_s = self.progress.seconds
        if not self.ranks.first:
            return
        progress = self.progress
        if self.device.type == "cpu" and progress.cpu_dtype is None:  # whoever goes on on a CPU goes on in this type
            progress = replace(progress, cpu_dtype="float32" if self.dtype is None else "bfloat16")
        save_checkpoint(
            self.config.out / file,
            progress,
            model=self.model,
            ema=self.ema,
            optimizers=self.optimizers,
            scaler=self.scaler,
        )

    def run(self) -> None:
        """Train to the end, or until `stopping` is set; either way the last state is saved."""
        c = self.config
        work_s = work_clock(self.device)
        stopped, usual_s = False, math.inf
        cuda = self.device.type == "cuda"
        peak_gflops = torch_gflops(self.device, self.dtype or torch.float32) if cuda else None
        with (
            open_log(c.out / LOG_FILE, self.progress.step, self.ranks.first) as log,
            progress_bar(c.steps, c.minutes, self.ranks.first) as bar,
            self._preparer,
        ):
            while not stopped and fraction_done(c, self.progress) < 1.0:
                started, worked, before = time.perf_counter(), work_s(), self.progress
                steps = self.steps_unread()
                losses, norms = self.checked(steps, before.step)
                # All processes share one clock and one decision to stop, or the next exchange would wait forever.
                elapsed, stop = self.ranks.largest(time.perf_counter() - started, self.stopping)
                (worked_s,) = self.ranks.sums(work_s() - worked)
                stopped = stop > 0
                p = self.progress
                counted_s, usual_s = counted_seconds(elapsed / len(steps), usual_s)
                self.progress = replace(
                    p, seconds=p.seconds + len(steps) * counted_s, compute_seconds=p.compute_seconds + worked_s
                )
                due = validation_due(c, before, self.progress)
                valid = self.validate_and_keep() if due else None
                rows = log_rows(
                    steps,
                    losses,
                    norms=norms,
                    before=before,
                    after=self.progress,
                    elapsed_s=elapsed,
                    valid=valid,
                    peak_gflops=peak_gflops,
                    device=self.device,
                )
                for row in rows:
                    log(row)  # before the checkpoint: resuming drops a row too many, and cannot restore a missing one
                    if self.wandb is not None:
                        self.wandb(row)
                    bar(row)
                if due:
                    self.save(LAST)
                    self.draw_curves()
            self.stopping = stopped
            self.save(LAST)
            self.draw_curves()

    def describe(self) -> str:
        """The network, the machine, the data, the length and the run folder, for the first lines of output."""
        c, p = self.config, self.progress
        length = f"{c.steps:,} steps" if c.minutes is None else f"{c.minutes:g} minutes"
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        processes = f", {self.ranks.processes} processes" if self.ranks.processes > 1 else ""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        mixture = ", ".join(f"{name} {share:.0%}" for name, share in self.mixture.items())
        start = f" from {c.init}" if c.init else ""
        return (
            f"{p.model.name}{start}, {parameters / 1e6:.2f} M parameters, {c.stage}: {mixture}, "
            f"on {machine_of(self.device, self.dtype)}{threads}{processes}\n"
            f"data {c.data}: {len(self.data.train):,} stories; {length}, {c.batch_size} stories a step, "
            f"from step {p.step:,}\n"
            f"run folder {c.out}: Ctrl-C saves and ends; go on with --resume {c.out}"
        )

    def draw_curves(self) -> None:
        """Redraw curves.png from the log."""
        if self.ranks.first:
            plot_curves(self.config.out)

    def validate_and_keep(self) -> float:
        """Validate, and save the best checkpoint so far.  → nats per token"""
        valid = self.validate()
        # Before broken weights replace the last good ones.
        check_finite("validation loss", valid, step=self.progress.step, out=self.config.out)
        if self.progress.best_nats is None or valid < self.progress.best_nats:
            self.progress = replace(self.progress, best_nats=valid)
            self.save(BEST)
        return valid


def main() -> None:
    """Train or resume a run; SIGINT, SIGTERM and SIGHUP save it and end."""
    with joined_ranks() as ranks, laid_out_by_first(ranks) as (args, config, progress):
        device = best_device()
        trainer = Trainer(config, progress, data=load_data(config.data), device=device, ranks=ranks, wandb=args.wandb)
        if args.resume:
            trainer.resume()
        elif args.init:
            trainer.start_from(args.init)

        def stop(signum: int, frame: object) -> None:
            trainer.stopping = True

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, stop)
        if ranks.first:
            print(trainer.describe(), flush=True)
        trainer.run()
    if not ranks.first:
        leave(ranks)
        return
    state = f"stopped at step {trainer.progress.step}; continue with --resume {config.out}"
    best = trainer.progress.best_nats
    measured = "not measured yet" if best is None else f"{best:.4f} nats per token"
    print(f"{config.out}: {state if trainer.stopping else 'done'}; best validation loss {measured}")
    leave(ranks)
