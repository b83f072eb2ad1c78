"""Losses and gradient norms stay on the device until they are read: on CUDA every few steps, since reading waits."""

import math
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from host.train.checkpoint import LAST, Progress
from host.train.logging import LogRow
from shared.errors import DiffusionLLMError

READ_EVERY: Final = 10  # steps, on CUDA


class StepResult(NamedTuple):
    """loss: nats per token; norm: of the gradient, both still on the device. gflop: see `host.train.flops`."""

    loss: Tensor  # ()
    norm: Tensor  # ()
    tokens: int
    lr: float
    gflop: float


def steps_between_readings(device: torch.device) -> int:
    """Steps that may be under way at once. A CPU computes as it is asked, so that waiting costs it nothing."""
    return READ_EVERY if device.type == "cuda" else 1


def read(steps: Sequence[StepResult]) -> tuple[list[float], list[float]]:
    """Wait for the device once.  → losses, gradient norms"""
    values = torch.stack([torch.stack([step.loss.double(), step.norm.double()]) for step in steps]).tolist()
    losses, norms = (list(column) for column in zip(*values, strict=True))
    return losses, norms


class NonFiniteLoss(DiffusionLLMError):
    """Training diverged."""


def check_finite(name: str, value: float, *, step: int, out: Path) -> None:
    """Raise NonFiniteLoss unless it is finite. out: the run folder, whose last checkpoint is good."""
    if not math.isfinite(value):
        last = out / LAST
        good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been saved yet"
        raise NonFiniteLoss(f"the {name} became {value} at step {step}; {good}; try a lower --lr")


def memory_mb(device: torch.device) -> float:
    """The most memory so far: allocated on a GPU, or resident of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def log_rows(
    steps: Sequence[StepResult],
    losses: Sequence[float],
    *,
    norms: Sequence[float],
    before: Progress,
    after: Progress,
    elapsed_s: float,
    valid: float | None,
    peak_gflops: float | None,
    device: torch.device,
) -> list[LogRow]:
    """One row for each step; steps that were read together share their time evenly.

    before, after: progress around them; valid: after the last. peak_gflops: of this device's matrix products.
    """
    rows, tokens, rate = [], before.tokens_seen, len(steps) / elapsed_s
    for number, (step, loss, norm) in enumerate(zip(steps, losses, norms, strict=True), 1):
        done, tokens = number / len(steps), tokens + step.tokens
        rows.append(
            LogRow(
                step=before.step + number,
                tokens=tokens,
                seconds=before.seconds + done * (after.seconds - before.seconds),
                loss=loss,
                valid=valid if number == len(steps) else None,
                lr=step.lr,
                grad_norm=norm,
                tokens_per_s=step.tokens * rate,
                compute_s=before.compute_seconds + done * (after.compute_seconds - before.compute_seconds),
                gflops=step.gflop * rate,
                mfu=None if peak_gflops is None else step.gflop * rate / peak_gflops,
                memory_mb=memory_mb(device),
            )
        )
    return rows
