"""Short trainings of equal budget that differ in one thing each, and one table of what it changed.

`python -m host.ablate --minutes 5 -- --config tiny --data data/stories` trains every variant below for five minutes,
each seed in a run of its own; a command that was interrupted goes on where it stopped.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from host.checkpoint import LAST, find_checkpoint, load_model, read_progress
from host.evaluate import evaluate, held_out_split
from host.runs import read_config
from host.scoring import TorchScorer
from shared.errors import ConfigError, DiffusionLLMError, run_main

VARIANTS: Final[dict[str, tuple[str, ...]]] = {
    "defaults": (),
    "Muon": ("--optimizer", "muon"),
    "cosine schedule": ("--schedule", "cosine"),
    "flat weighting": ("--weighting", "flat"),
    "time input": ("--time-input",),
}
"""Flags of host.train that each variant adds. Averaged and raw weights are two columns of every row."""
DRAWS: Final = 4


@dataclass(frozen=True)
class Row:
    """A variant's bits a byte on held-out text, one figure a seed."""

    name: str
    averaged: list[float]
    raw: list[float]
    million_tokens: float
    command: str


def train_command(name: str, seed: int, out: Path, length: list[str], common: list[str]) -> list[str]:
    """What a user would type after `python`; a run that exists is continued instead."""
    run = out / f"{name.replace(' ', '-').lower()}-{seed}"
    if (run / LAST).is_file():
        return ["-m", "host.train", "--resume", str(run)]
    return ["-m", "host.train", *common, *VARIANTS[name], *length, "--seed", str(seed), "--out", str(run)]


def measure(name: str, seeds: list[int], out: Path, length: list[str], common: list[str], stories: int) -> Row:
    """Train one variant with every seed, then measure averaged and raw weights on the same stories and noise."""
    bits: dict[Literal["ema", "model"], list[float]] = {"ema": [], "model": []}
    tokens = []
    for seed in seeds:
        run = out / f"{name.replace(' ', '-').lower()}-{seed}"
        command = train_command(name, seed, out, length, common)
        print(f"$ python {shlex.join(command)}", flush=True)
        if subprocess.run([sys.executable, *command]).returncode:
            raise DiffusionLLMError(f"the run {run} failed; its own message stands above")
        held_out = held_out_split(read_config(run).data, stories)
        for weights, found in bits.items():
            model, progress = load_model(find_checkpoint(run, LAST), weights)
            found.append(evaluate(TorchScorer(model), held_out, progress.schedule, DRAWS).bits_per_byte.value)
        tokens.append(read_progress(run / LAST).tokens_seen / 1e6)
    shown = shlex.join(["python", "-m", "host.train", *common, *VARIANTS[name], *length])
    return Row(name, bits["ema"], bits["model"], statistics.mean(tokens), shown)


def print_table(rows: list[Row]) -> None:
    """Mean over seeds and, with several, their standard deviation; in the form of a page of docs/."""
    print("| variant | bits a byte, averaged weights | raw weights | million tokens | command |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [_spread(row.averaged), _spread(row.raw), f"{row.million_tokens:.2f}", f"`{row.command}`"]
        print(f"| {row.name} | {' | '.join(cells)} |")


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def main() -> None:
    """Run the variants one after another, and print the table."""
    own, common = sys.argv[1:], list[str]()
    if "--" in own:
        own, common = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m host.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m host.ablate [flags] [-- flags of host.train that all variants share]",
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="of each run")
    length.add_argument("--steps", type=int, help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each (default: 0)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help=f"of: {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder of runs (default: %(default)s)")
    parser.add_argument("--stories", type=int, default=128, help="to measure on (default: %(default)s)")
    args = parser.parse_args(own)
    names = args.only or list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"--only: no variant is called {name!r}: choose of {', '.join(VARIANTS)}")
    if args.stories < 1:
        raise ConfigError(f"--stories must be at least 1, not {args.stories}")
    budget = ["--minutes", str(args.minutes)] if args.minutes is not None else ["--steps", str(args.steps)]
    print_table([measure(name, args.seeds, args.out, budget, common, args.stories) for name in names])


if __name__ == "__main__":
    run_main(main)
