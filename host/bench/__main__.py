"""Benchmarks of the training host.

`python -m host.bench` times our training loop beside the baseline's; `step` measures what `edge.bench` compares with.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Final

import msgspec

from host.bench.step import measure_step
from host.bench.training import measure_training
from host.data.prepare import DEFAULT_OUT
from host.data.shards import load_data
from host.files import check_numbers
from host.model.network import ModelConfig, config_named
from host.train.objectives import parse_mixture
from host.train.optim import PEAK_RATES
from host.train.run_folder import TrainConfig, usual_batch_size, usual_micro_size
from shared.errors import ConfigError, run_main
from shared.tokens import FIRST_TEXT_ID

SHAPE: Final = {
    "d_model": "width of the network",
    "layers": "transformer blocks",
    "heads": "attention heads of a block",
    "vocab_size": "tokens of the vocabulary",
    "canvas_len": "positions of a canvas",
}
MOST: Final = {"steps": 1_000_000, "threads": 1024, "batch_size": 1 << 16, "micro_size": 1 << 16}


def bench_step(args: argparse.Namespace) -> None:
    """Print the StepSpeed of the given shape as JSON."""
    shape = [getattr(args, name) for name in SHAPE]
    if min(shape) < 1 or args.d_model % args.heads or args.vocab_size <= FIRST_TEXT_ID:
        raise ConfigError(f"no network has the shape {' '.join(map(str, shape))}")
    print(msgspec.json.encode(measure_step(ModelConfig("bench", *shape), args.threads)).decode())


def bench_train(args: argparse.Namespace) -> None:
    """Print one line for each configuration and mixture of objectives."""
    configs = [config_named(name) for name in args.config]
    data = load_data(args.data, verify=True)
    batch_size = usual_batch_size() if args.batch_size is None else args.batch_size
    micro_size = usual_micro_size(batch_size) if args.micro_size is None else args.micro_size
    settings = TrainConfig(
        Path(),
        args.data,
        batch_size=batch_size,
        micro_size=micro_size,
        optimizer=args.optimizer,
        lr=PEAK_RATES[args.optimizer],
    )
    mixtures = {given: parse_mixture(given) for given in args.objectives}
    for number, (config, given) in enumerate(itertools.product(configs, mixtures)):
        speed = measure_training(
            config, data, settings=settings, objectives=mixtures[given], steps=args.steps, threads=args.threads
        )
        if number == 0:
            peaks = " ".join(f"{f'{name} peak':>10}" for name in speed.peaks)
            print(
                f"{'config':8} {'objectives':24} {'threads':>7} {'ours, tokens/s':>14} {'baseline':>9} {'ratio':>6} "
                f"{'GFLOP/s':>8} {peaks} {f'of {speed.peak_type} peak':>13}"
            )
        peaks = " ".join(f"{peak:10.0f}" for peak in speed.peaks.values())
        print(
            f"{speed.config:8} {given:24} {speed.threads:7} {speed.tokens_per_s:14,.0f} "
            f"{speed.baseline_tokens_per_s:9,.0f} {speed.ratio:6.2f} {speed.gflops:8.0f} {peaks} "
            f"{speed.fraction_of_peak:13.0%}"
        )
    source = f"{data.meta.source}, vocabulary {data.meta.vocab_size:,}"
    print(f"real tokens of {source}; medians of {args.steps} steps, in turn, ours of {batch_size} canvases")


def main() -> None:
    """Run the benchmark that the command line names."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        prog="python -m host.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples: python -m host.bench --config tiny, python -m host.bench step 384 6 6 8192 256",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="our training loop, the baseline's and the matmul peaks (the default)")
    train.add_argument("--config", nargs="+", default=["tiny", "small"], help="shapes (default: tiny small)")
    train.add_argument("--data", type=Path, default=DEFAULT_OUT, help="prepared data (default: %(default)s)")
    train.add_argument(
        "--objectives", nargs="+", default=["canvas"], metavar="MIXTURE", help="see host.train (default: canvas)"
    )
    train.add_argument("--optimizer", choices=["adamw", "muon"], default="muon", help="of ours (default: %(default)s)")
    train.add_argument("--batch-size", type=int, help="stories in a step of ours (default: as in host.train)")
    train.add_argument("--micro-size", type=int, help="stories in a pass of ours (default: as in host.train)")
    train.add_argument("--steps", type=int, default=5, help="of each loop (default: %(default)s)")
    train.add_argument("--threads", type=int, default=cores, help="of a CPU (default: %(default)s)")
    step = commands.add_parser("step", help="a torch step of one shape beside the matmul peaks, as JSON")
    for name, text in SHAPE.items():
        step.add_argument(name, type=int, help=text)
    step.add_argument("--threads", type=int, default=cores, help="of a CPU (default: %(default)s)")
    given = sys.argv[1:]
    named = bool(given) and given[0] in (*commands.choices, "-h", "--help")
    args = parser.parse_args(given if named else ["train", *given])
    check_numbers(args, MOST)
    {"train": bench_train, "step": bench_step}[args.command](args)


if __name__ == "__main__":
    run_main(main)
