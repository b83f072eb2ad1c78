"""Runs side by side at equal CPU-hours (device-hours on a GPU) and at equal epochs: a table and a picture.

`python -m host.compare ours=runs/ours baseline=runs/baseline AR=runs/ar` reads the validation losses that the runs
logged. The cost of a run started with --init includes that of the run it started from.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from host.train.logging import LOG_FILE, read_log
from host.train.plots import save_picture
from host.train.run_folder import data_of, read_config, work_before
from shared.errors import ConfigError, DataError

PICTURE = Path("compare.png")
HOURS = "CPU-hours (device-hours on a GPU)"


@dataclass(frozen=True)
class Point:
    """Bits per byte on validation stories; compute time and tokens include those of the --init run."""

    compute_s: float
    tokens: int
    bits_per_byte: float


@dataclass(frozen=True)
class Curve:
    """A run's course. epoch_tokens: those of the training split."""

    name: str
    points: list[Point]
    epoch_tokens: int

    def at(self, compute_s: float) -> float | None:
        """Bits per byte after that compute time, interpolated; None outside the curve."""
        times = [point.compute_s for point in self.points]
        if not times[0] <= compute_s <= times[-1]:
            return None
        return float(np.interp(compute_s, times, [point.bits_per_byte for point in self.points]))


def read_curve(name: str, run: Path) -> Curve:
    """A run's validation losses; DataError when it has none."""
    meta = data_of(run).meta
    bits = meta.valid.tokens / meta.valid.text_bytes / math.log(2)  # bits per byte of one nat per token
    before = work_before(read_config(run))
    try:
        rows = read_log(run / LOG_FILE)
    except OSError as error:
        raise DataError(f"{run / LOG_FILE} cannot be read: {error.strerror}") from None
    points = [
        Point(
            before.compute_seconds + float(row["compute_s"]),
            before.tokens + int(row["tokens"]),
            bits * float(row["valid"]),
        )
        for row in rows
        if row["valid"]
    ]
    if not points:
        raise DataError(f"{run} has not validated yet")
    return Curve(name, points, meta.train.tokens)


def print_table(curves: list[Curve]) -> None:
    """Each run at its end and at the end of the shortest, as a Markdown table."""
    equal_s = min(curve.points[-1].compute_s for curve in curves)
    print(f"| run | {HOURS} | million tokens | epochs | bits per byte | after {equal_s / 3600:.2f} hours |")
    print("| --- | --- | --- | --- | --- | --- |")
    for curve in curves:
        end, equal = curve.points[-1], curve.at(equal_s)
        print(
            f"| {curve.name} | {end.compute_s / 3600:.2f} | {end.tokens / 1e6:.2f} | "
            f"{end.tokens / curve.epoch_tokens:.2f} | {end.bits_per_byte:.4f} | "
            f"{'not measured' if equal is None else f'{equal:.4f}'} |"
        )


def draw(path: Path, curves: list[Curve]) -> None:
    """Bits per byte against compute hours, and against epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5))
    left, right = figure.subplots(1, 2, sharey=True)
    for curve in curves:
        bits = [point.bits_per_byte for point in curve.points]
        left.plot([point.compute_s / 3600 for point in curve.points], bits, ".-", label=curve.name)
        right.plot([point.tokens / curve.epoch_tokens for point in curve.points], bits, ".-")
    lowest = min(point.bits_per_byte for curve in curves for point in curve.points)  # not the end where one overfits
    highest = max(curve.points[-1].bits_per_byte for curve in curves)  # the first steps would squeeze the rest
    left.set_ylim(0.95 * lowest, 1.1 * highest)
    left.set_ylabel("bits per byte")
    left.set_xlabel(HOURS)
    right.set_xlabel("epochs")
    left.legend()
    save_picture(figure, path)


def main() -> None:
    """Print the table, draw the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m host.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m host.compare ours=runs/ours AR=runs/ar baseline=runs/baseline; "
        "train the last two with `host.train --objectives ar` and `python -m host.baseline`",
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="run folders, and what to call them")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture (default: %(default)s)")
    args = parser.parse_args()
    named = [given.partition("=") for given in args.runs]
    for given, (name, _, run) in zip(args.runs, named, strict=True):
        if not name or not run:
            raise ConfigError(f"{given!r} is not NAME=RUN, for instance ours=runs/tinystories")
    if len({data_of(Path(run)).meta.sha256 for _, _, run in named}) > 1:
        raise ConfigError("these runs were measured on different validation text: train them on one data folder")
    curves = [read_curve(name, Path(run)) for name, _, run in named]
    print_table(curves)
    draw(args.out, curves)
    print(f"\npicture: {args.out}")
