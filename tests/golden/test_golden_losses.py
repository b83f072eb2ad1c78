"""The first ten losses of a seeded run: a change of the loop that is meant to change nothing reproduces them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from host.data.shards import DataFolder, DataMeta, Split, SplitMeta
from host.model.diffusion import Weighting
from host.model.network import config_named
from host.train import trainer as train
from host.train.checkpoint import Progress
from host.train.optim import OptimizerName
from host.train.run_folder import TrainConfig
from host.train.trainer import Trainer
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, PAD

GOLDEN: dict[tuple[str, OptimizerName, Weighting], list[float]] = {
    ("canvas", "adamw", "nelbo"): [
        5.894554,
        6.057524,
        6.453038,
        5.742867,
        7.790717,
        6.044481,
        5.02203,
        5.782885,
        5.995565,
        5.817423,
    ],
    ("canvas", "muon", "nelbo"): [
        5.894554,
        6.057568,
        6.489342,
        5.772023,
        7.8633,
        6.086415,
        5.057129,
        5.807752,
        6.01636,
        5.829884,
    ],
    ("canvas", "muon", "flat"): [
        5.641144,
        6.496237,
        7.698112,
        5.401339,
        5.766083,
        5.769464,
        4.150433,
        7.328948,
        6.292068,
        8.272099,
    ],
    ("ar", "adamw", "nelbo"): [
        6.252448,
        6.255513,
        6.130841,
        6.088839,
        6.002987,
        5.878111,
        5.872187,
        5.721251,
        5.623552,
        5.695048,
    ],
}


def folder() -> DataFolder:
    """Sixty-four stories of like words, each going up in steps of its own."""
    canvases = np.full((64, 256), PAD, np.uint16)
    for i, row in enumerate(canvases):
        end = 20 + 7 * i % 230
        row[0], row[end] = BOS, EOS
        row[1:end] = FIRST_TEXT_ID + (i + np.arange(end - 1) * (1 + i % 5)) % 100
    split = Split((canvases,))
    counts = SplitMeta(64, 0, 0, 0, {}, (), ())
    return DataFolder(Path(), DataMeta(2, "test", "", 512, 256, "", "", *3 * (counts,)), *3 * (split,))


@pytest.mark.parametrize(("objective", "optimizer", "weighting"), GOLDEN)
def test_losses_of_the_first_ten_steps(
    objective: str,
    optimizer: OptimizerName,
    weighting: Weighting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With flat weights the time is not told, as by default.

    Float32, one thread. Sums in another order, as of other processors, change the sixth digit.
    """
    monkeypatch.setattr(train, "mixed_precision_dtype", lambda *_: None)
    shape = replace(config_named("debug"), time_input=objective == "canvas" and weighting == "nelbo")
    settings = TrainConfig(
        tmp_path, Path(), steps=20, batch_size=8, micro_size=3, optimizer=optimizer, weighting=weighting, lr=1e-3
    )
    trainer = Trainer(settings, Progress(shape, {objective: 1.0}, "linear"), data=folder(), device=torch.device("cpu"))
    losses = []
    for step in range(10):
        losses.append(float(trainer.step().loss))
        trainer.progress = replace(trainer.progress, step=step + 1)
    print([round(loss, 6) for loss in losses])
    assert losses == pytest.approx(GOLDEN[objective, optimizer, weighting], rel=2e-5)
