"""Pictures as PNG."""

from pathlib import Path
from typing import TYPE_CHECKING

from host.train.logging import LOG_FILE, read_log
from shared.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_curves(run: Path) -> None:
    """Draw log.csv into curves.png: training loss with its running mean, validation loss, learning rate."""
    from matplotlib.figure import Figure

    rows = read_log(run / LOG_FILE)
    tokens = [int(row["tokens"]) / 1e6 for row in rows]
    loss = [float(row["loss"]) for row in rows]
    smooth, mean = [], loss[0] if loss else 0.0
    for value in loss:
        mean += 0.05 * (value - mean)
        smooth.append(mean)
    valid = [(x, float(row["valid"])) for x, row in zip(tokens, rows, strict=True) if row["valid"]]
    figure = Figure(figsize=(8, 6))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot(tokens, loss, color="tab:blue", alpha=0.2)
    above.plot(tokens, smooth, color="tab:blue", label="training as it is weighted, running mean")
    if valid:
        above.plot(*zip(*valid, strict=True), "o-", color="tab:orange", label="validation, nats per token, EMA weights")
        # Limits without the first steps, whose losses would squeeze the rest.
        settled = [*smooth[len(smooth) // 20 :], *(value for x, value in valid if x > tokens[-1] / 20)]
        above.set_ylim(0.9 * min(settled), 1.05 * max(settled))
    above.set_ylabel("nats")
    above.legend()
    below.plot(tokens, [float(row["lr"]) for row in rows], color="tab:green")
    below.set_ylabel("learning rate")
    below.set_xlabel("million tokens")
    save_picture(figure, run / "curves.png")


def save_picture(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG; ConfigError when it cannot be written."""
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise ConfigError(f"the picture {path} cannot be written: {error.strerror}") from None
