"""The first ten losses of a seeded run: a change of the loop that is meant to change nothing reproduces them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from host import train
from host.checkpoint import Progress
from host.diffusion import Objective
from host.model import config_named
from host.optim import OptimizerName
from host.runs import TrainConfig
from host.shards import DataFolder, DataMeta, Split, SplitMeta
from host.train import Trainer
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, PAD

GOLDEN: dict[tuple[Objective, OptimizerName], list[float]] = {
    ("diffusion", "adamw"):
        [5.890131, 6.05634, 6.450605, 5.743852, 7.79531, 6.046031, 5.021933, 5.784259, 5.998304, 5.817615],
    ("diffusion", "muon"):
        [5.890131, 6.056387, 6.486992, 5.773116, 7.876139, 6.090253, 5.060726, 5.810613, 6.021639, 5.831946],
    ("ar", "adamw"):
        [6.255544, 6.260461, 6.137192, 6.094143, 6.011657, 5.892454, 5.886144, 5.729749, 5.63038, 5.711014],
}  # fmt: skip


def folder() -> DataFolder:
    """Sixty-four stories of like words, each going up in steps of its own."""
    canvases = np.full((64, 256), PAD, np.uint16)
    for i, row in enumerate(canvases):
        end = 20 + 7 * i % 230
        row[0], row[end] = BOS, EOS
        row[1:end] = FIRST_TEXT_ID + (i + np.arange(end - 1) * (1 + i % 5)) % 100
    split = Split((canvases,))
    counts = SplitMeta(64, 0, 0, 0, {}, (), ())
    return DataFolder(Path(), DataMeta(1, "test", "", 512, 256, "", "", counts, counts), split, split)


@pytest.mark.parametrize(("objective", "optimizer"), GOLDEN)
def test_the_first_ten_losses(
    objective: Objective, optimizer: OptimizerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32, one thread. Sums in another order, as of other processors, change the sixth digit."""
    monkeypatch.setattr(train, "mixed_precision_dtype", lambda device: None)
    shape = replace(config_named("debug"), time_input=objective == "diffusion")
    settings = TrainConfig(tmp_path, Path(), steps=20, batch_size=8, micro_size=3, optimizer=optimizer)
    trainer = Trainer(settings, Progress(shape, objective, "linear"), folder(), torch.device("cpu"))
    losses = []
    for step in range(10):
        losses.append(trainer.step()[0])
        trainer.progress = replace(trainer.progress, step=step + 1)
    print([round(loss, 6) for loss in losses])
    assert losses == pytest.approx(GOLDEN[objective, optimizer], rel=2e-5)
