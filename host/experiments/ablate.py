"""Short trainings of equal budget that differ in one thing each, and one table of what it changed.

`python -m host.ablate --minutes 5 -- --config tiny --data data/stories` trains every variant below for five minutes,
each seed in a run of its own; a command that was interrupted goes on where it stopped. On a machine that does other
work meanwhile, budgets are equal in --steps only.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Literal

from host.data.shards import load_data
from host.evaluate.likelihood import evaluate, held_out_split
from host.evaluate.scorers import TorchScorer
from host.train.arguments import parse_arguments
from host.train.checkpoint import LAST, find_checkpoint, load_model, read_progress
from host.train.optim import PEAK_RATES
from host.train.run_folder import TrainConfig, data_of, fraction_done, planned_run, read_config
from shared.errors import ConfigError, DiffusionLLMError

DRAWS: Final = 4
UNASKED: Final = ("out", "init_work", "data_sha256")
SETTINGS: Final = tuple(field.name for field in fields(TrainConfig) if field.name not in UNASKED)
NATURE: Final = ("model", "objectives", "schedule", "tokenizer_sha256")
"""Fields of a run's settings and of its progress that its flags and data decide."""


def variants(common: list[str]) -> dict[str, list[str]]:
    """Flags of host.train that each variant adds to those that all share.

    EMA and raw weights are two columns of every row.
    """
    shared = parse_arguments(common)
    rate = shared.lr or PEAK_RATES[shared.optimizer]
    return {
        "defaults": [],
        "AdamW": ["--optimizer", "adamw"],
        "twice the rate": ["--lr", str(2 * rate)],
        "cosine schedule": ["--schedule", "cosine"],
        "NELBO weighting": ["--weighting", "nelbo"],
        "time input": ["--time-input"],
    }


@dataclass(frozen=True)
class Row:
    """A variant's bits per byte on validation stories, one figure for each seed."""

    name: str
    ema: list[float]
    raw: list[float]
    million_tokens: float
    command: str


def train_command(run: Path, seed: int, of_variant: list[str]) -> list[str]:
    """What a user would type after `python`; a run that exists is continued instead, if these flags made it."""
    flags = [*of_variant, "--seed", str(seed), "--out", str(run)]
    if not (run / LAST).is_file():
        return ["-m", "host.train", *flags]
    args = parse_arguments(flags)
    asked, found = planned_run(args, load_data(args.data)), (read_config(run), read_progress(run / LAST))
    for here, there, names in zip(asked, found, (SETTINGS, NATURE), strict=True):
        for field in names:
            if getattr(here, field) != getattr(there, field):
                raise ConfigError(
                    f"{run} was trained with {field} {getattr(there, field)} instead of "
                    f"{getattr(here, field)}: choose another --out"
                )
    return ["-m", "host.train", "--resume", str(run)]


def train(run: Path, command: list[str]) -> None:
    """Train a run to its end. Ctrl-C reaches it too, and waits until it has saved."""
    print(f"$ python {shlex.join(command)}", flush=True)
    with subprocess.Popen([sys.executable, *command]) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
    if status:
        raise DiffusionLLMError(f"the run {run} failed; its own message stands above")
    if fraction_done(read_config(run), read_progress(run / LAST)) < 1:
        raise DiffusionLLMError(f"the run {run} was stopped before its end; the same command goes on with it")


def measure(name: str, flags: list[str], *, seeds: list[int], out: Path, stories: int) -> Row:
    """Train with `flags` and every seed, then measure EMA and raw weights on the same stories and noise."""
    bits: dict[Literal["ema", "model"], list[float]] = {"ema": [], "model": []}
    tokens = []
    for seed in seeds:
        run = out / f"{name.replace(' ', '-').lower()}-{seed}"
        train(run, train_command(run, seed, flags))
        held_out = held_out_split(data_of(run), stories)
        for weights, found in bits.items():
            model, progress = load_model(find_checkpoint(run, LAST), weights)
            found.append(evaluate(TorchScorer(model), held_out, progress.schedule, DRAWS).bits_per_byte.value)
        tokens.append(read_progress(run / LAST).tokens_seen / 1e6)
    shown = shlex.join(["python", "-m", "host.train", *flags])
    return Row(name, bits["ema"], bits["model"], statistics.mean(tokens), shown)


def print_table(rows: list[Row]) -> None:
    """Mean over seeds and, with several, their standard deviation; in the form of a page of docs/."""
    print("| variant | bits per byte, EMA weights | raw weights | million tokens | command |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [_spread(row.ema), _spread(row.raw), f"{row.million_tokens:.2f}", f"`{row.command}`"]
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
        epilog="example: python -m host.ablate --steps 500 --seeds 0 1 --only defaults AdamW -- --config tiny",
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="training time of each run")
    length.add_argument("--steps", type=int, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each (default: 0)")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help=f"among {', '.join(variants([]))} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder of runs (default: %(default)s)")
    parser.add_argument("--stories", type=int, default=128, help="to evaluate on (default: %(default)s)")
    args = parser.parse_args(own)
    added = variants(common)
    names = args.only or list(added)
    for name in names:
        if name not in added:
            raise ConfigError(f"--only: no variant is called {name!r}: choose among {', '.join(added)}")
    for seed in args.seeds:
        if args.seeds.count(seed) > 1:
            raise ConfigError(f"--seeds names {seed} twice: a seed again makes the same run again")
    if args.stories < 1:
        raise ConfigError(f"--stories must be at least 1, not {args.stories}")
    budget = ["--minutes", str(args.minutes)] if args.minutes is not None else ["--steps", str(args.steps)]
    if "canvas" not in parse_arguments([*common, *budget]).objectives:
        raise ConfigError("--objectives must hold canvas: an ablation measures its bound")
    options = {"seeds": args.seeds, "out": args.out, "stories": args.stories}
    print_table([measure(name, [*common, *added[name], *budget], **options) for name in names])
