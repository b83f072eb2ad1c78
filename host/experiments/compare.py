"""Runs side by side at equal processor-hours and at equal epochs: one table, one picture.

`python -m host.compare ours=runs/ours textbook=runs/textbook AR=runs/ar` reads what the runs logged about the same
held-out stories. A run that began with another's weights is charged for that run too.
"""

import argparse
import math
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from host.train.logging import LOG_FILE, UNNAMED, machines_of, read_log
from host.train.plots import save_picture
from host.train.run_folder import data_of, read_config, work_before
from shared.errors import ConfigError, DataError

PICTURE = Path("compare.png")


@dataclass(frozen=True)
class Point:
    """Bits a byte on held-out stories after so much work, on any text before included."""

    processor_s: float
    tokens: int
    bits_per_byte: float


@dataclass(frozen=True)
class Curve:
    """What a run reached over its time. epochs: tokens ÷ those of the training split.

    machines: those that it was trained on, by name, and the run that it began with.
    """

    name: str
    points: list[Point]
    epoch_tokens: int
    machines: tuple[str, ...] = ()

    def at(self, processor_s: float) -> float | None:
        """Bits a byte after so much work, by the line between two measurements; None outside the curve."""
        times = [point.processor_s for point in self.points]
        if not times[0] <= processor_s <= times[-1]:
            return None
        after = bisect_right(times, processor_s)
        if after == len(times):
            return self.points[-1].bits_per_byte
        before, behind = self.points[after - 1], self.points[after]
        part = (processor_s - before.processor_s) / (behind.processor_s - before.processor_s)
        return before.bits_per_byte + part * (behind.bits_per_byte - before.bits_per_byte)


def read_curve(name: str, run: Path) -> Curve:
    """A run's validation losses; DataError when it has none, or was logged without processor time."""
    meta = data_of(run).meta
    bits = meta.valid.tokens / meta.valid.text_bytes / math.log(2)  # bits a byte of one nat a token
    before = work_before(read_config(run))
    if before.processor_seconds is None:
        raise DataError(f"{run} began with a run that an older version trained, without counting its processor time")
    log = _log(run)
    points = [
        Point(
            before.processor_seconds + float(row["processor_s"]),
            before.tokens + int(row["tokens"]),
            bits * float(row["valid"]),
        )
        for row in log
        if row["valid"]
    ]
    if not points:
        raise DataError(f"{run} has not measured any held-out text yet")
    machines = before.machines or ((UNNAMED,) if before.processor_seconds else ())
    return Curve(name, points, meta.train.tokens, tuple(dict.fromkeys((*machines, *machines_of(log)))))


def _log(run: Path) -> list[dict[str, str]]:
    try:
        rows = read_log(run / LOG_FILE)
    except OSError as error:
        raise DataError(f"{run / LOG_FILE} cannot be read: {error.strerror}") from None
    if any(not row.get("processor_s") for row in rows):
        raise DataError(f"{run / LOG_FILE} counts no processor time: it was written by an older version")
    return rows


def print_table(curves: list[Curve]) -> None:
    """The end of each run, and every run at the end of the shortest; in the form of a page of docs/."""
    equal_s = min(curve.points[-1].processor_s for curve in curves)
    print(f"| run | processor-hours | million tokens | epochs | bits a byte | after {equal_s / 3600:.2f} hours |")
    print("| --- | --- | --- | --- | --- | --- |")
    for curve in curves:
        end, equal = curve.points[-1], curve.at(equal_s)
        print(f"| {curve.name} | {end.processor_s / 3600:.2f} | {end.tokens / 1e6:.2f} | "
              f"{end.tokens / curve.epoch_tokens:.2f} | {end.bits_per_byte:.4f} | "
              f"{'not measured' if equal is None else f'{equal:.4f}'} |")  # fmt: skip


def draw(path: Path, curves: list[Curve]) -> None:
    """Bits a byte against processor-hours, and against epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for curve in curves:
        bits = [point.bits_per_byte for point in curve.points]
        left.plot([point.processor_s / 3600 for point in curve.points], bits, ".-", label=curve.name)
        right.plot([point.tokens / curve.epoch_tokens for point in curve.points], bits, ".-")
    lowest = min(point.bits_per_byte for curve in curves for point in curve.points)  # not the end where one overfits
    highest = max(curve.points[-1].bits_per_byte for curve in curves)  # the first steps would squeeze the rest
    left.set_ylim(0.95 * lowest, 1.1 * highest)
    left.set_ylabel("bits a byte")
    left.set_xlabel("processor-hours")
    right.set_xlabel("epochs")
    left.legend()
    save_picture(figure, path)


def main() -> None:
    """Print the table, draw the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m host.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="train the yardsticks with `host.train --objective ar` and `python -m host.textbook`",
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="run folders, and what to call them")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture (default: %(default)s)")
    args = parser.parse_args()
    named = [given.partition("=") for given in args.runs]
    for given, (name, _, run) in zip(args.runs, named, strict=True):
        if not name or not run:
            raise ConfigError(f"{given!r} is not NAME=RUN, for instance ours=runs/tinystories")
    if len({data_of(Path(run)).meta.sha256 for _, _, run in named}) > 1:
        raise ConfigError("these runs were measured on different held-out text: train them on one data folder")
    curves = [read_curve(name, Path(run)) for name, _, run in named]
    print_table(curves)
    if len({machine for curve in curves for machine in curve.machines}) > 1:
        print("\nprocessor-hours are of different machines:")
        for curve in curves:
            print(f"{curve.name}: {'; '.join(curve.machines)}")
    draw(args.out, curves)
    print(f"\npicture: {args.out}")
