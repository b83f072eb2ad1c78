"""Training speed: our loop and the baseline's, by turns on the same data, beside the machine's peak.

Tokens are text and EOS; work on padding counts for neither loop.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
import torch

from host.data.shards import DataFolder
from host.device import best_device, torch_gflops, wait_for
from host.experiments.baseline import BaselineLoop
from host.model.network import ModelConfig
from host.train.checkpoint import Progress
from host.train.flops import batch_gflop
from host.train.run_folder import TrainConfig
from host.train.trainer import Trainer

DTYPE_NAMES: Final = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class TrainSpeed(msgspec.Struct, frozen=True):
    """Medians over steps. gflop_per_token: forward and backward, without padding and unscored positions.

    peaks: GFLOP/s of square products by dtype, that of our loop first.
    """

    config: str
    device: str
    threads: int
    tokens_per_s: float
    baseline_tokens_per_s: float
    gflop_per_token: float
    peaks: dict[str, float]

    @property
    def ratio(self) -> float:
        """Our tokens/s over the baseline's."""
        return self.tokens_per_s / self.baseline_tokens_per_s

    @property
    def peak_type(self) -> str:
        """The dtype that our loop multiplies in."""
        return next(iter(self.peaks))

    @property
    def gflops(self) -> float:
        """Speed of the model's matrix products, GFLOP/s."""
        return self.tokens_per_s * self.gflop_per_token

    @property
    def fraction_of_peak(self) -> float:
        """gflops over the peak of our loop's dtype."""
        return self.gflops / self.peaks[self.peak_type]


def measure_training(
    config: ModelConfig,
    data: DataFolder,
    *,
    settings: TrainConfig,
    objectives: dict[str, float],
    steps: int,
    threads: int,
) -> TrainSpeed:
    """`steps` steps of each loop, taking turns, so that a busy machine slows both. Sets torch's number of threads."""
    torch.set_num_threads(threads)
    device = best_device()
    model = replace(config, vocab_size=data.meta.vocab_size)
    plain, numbers = BaselineLoop(model, data, device), itertools.count()

    def baseline() -> int:
        return plain.step(next(numbers))[2]

    with tempfile.TemporaryDirectory(prefix="host-bench-") as out:
        progress = Progress(model, objectives, "linear")
        trainer = Trainer(replace(settings, out=Path(out)), progress, data=data, device=device)

        def ours() -> int:
            tokens = trainer.step().tokens
            trainer.progress = replace(trainer.progress, step=trainer.progress.step + 1)
            return tokens

        for loop in (ours, baseline):  # buffers, kernels, clocks
            loop()
        rates: list[tuple[float, float]] = [(_rate(ours, device), _rate(baseline, device)) for _ in range(steps)]
        batches = [
            trainer.batch_at(data.train, settings.seed, step, settings.batch_size) for step in range(1, 1 + steps)
        ]
    own = trainer.dtype or torch.float32  # bf16 is not timed where it is emulated: a product takes seconds
    our_rate, their_rate = (statistics.median(column) for column in zip(*rates, strict=True))
    return TrainSpeed(
        config=config.name,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        threads=threads,
        tokens_per_s=our_rate,
        baseline_tokens_per_s=their_rate,
        gflop_per_token=statistics.mean(batch_gflop(model, batch) / batch.tokens for batch in batches),
        peaks={DTYPE_NAMES[dtype]: torch_gflops(device, dtype) for dtype in dict.fromkeys((own, torch.float32))},
    )


def _rate(loop: Callable[[], int], device: torch.device) -> float:
    """Tokens/s of one step."""
    wait_for(device)
    started = time.perf_counter()
    tokens = loop()
    wait_for(device)
    return tokens / (time.perf_counter() - started)
