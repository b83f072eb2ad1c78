"""The command line of `host.train`."""

import argparse
import math
from pathlib import Path
from typing import Final

from host.data.prepare import DEFAULT_OUT
from host.files import check_numbers
from host.model.network import CONFIGS
from host.train.objectives import OBJECTIVES, parse_mixture
from host.train.optim import PEAK_RATES
from host.train.run_folder import CPU_BATCH_SIZE, USUAL_SHAPE, VALID_EVERY, Stage, TrainConfig
from shared.errors import ConfigError

AT_MOST: Final = {
    "batch_size": 1 << 16,
    "micro_size": 1 << 16,
    "cool_down": 1.0,
    **dict.fromkeys(("steps", "minutes", "valid_every", "lr"), math.inf),
}
FRACTIONS: Final = ("dropout", "input_noise")  # at least 0, below 1
CHANGED_ON_RESUME: Final = ("resume", "steps", "minutes", "wandb")
DEFAULT_OBJECTIVES: Final = "ar=1,infill=.25,canvas=.1"
"""All three laws on one network; left to right has most of the stories, since it learns most in the first epochs."""
STAGES: Final[dict[Stage, str]] = {
    "body": "the network",
    "drafter": "what drafts tokens after the next one, so that a pass may commit several",
    "conditions": "all that makes it take words, and pictures with --pictures",
    "pictures": "after conditions, the encoder of pictures alone",
    "reads": "after conditions, what its blocks read of words and pictures alone",
}
OF_CANVAS: Final = ("schedule", "weighting", "time_input")
OF_BODY: Final = ("config", "objectives", "dropout", "input_noise", *OF_CANVAS)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ConfigError when a number is out of range or flags do not go together."""
    parser = argparse.ArgumentParser(
        prog="python -m host.train",
        description="Train a language model: autoregressive, by masked diffusion, by infilling, or all on one network.",
        epilog="example: python -m host.train --config tiny --minutes 60; continue it with --resume runs/NAME",
    )
    shape = f"model shape (default: that of --init, else {USUAL_SHAPE})"
    parser.add_argument("--config", choices=list(CONFIGS), help=shape)
    parser.add_argument("--data", type=Path, default=DEFAULT_OUT, help=f"data folder (default: {DEFAULT_OUT})")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/CONFIG-DATE-TIME)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="continue this run with its own settings")
    parser.add_argument("--init", type=Path, metavar="RUN", help="start from the weights of a run or published folder")
    parser.add_argument(
        "--stage",
        choices=list(STAGES),
        default="body",
        help=f"what to train: {'; '.join(f'{stage}: {what}' for stage, what in STAGES.items())}. All but body leave "
        "the network of --init as it is (default: %(default)s)",
    )
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="DATA",
        help="prepared pictures (host.data --pictures): --stage pictures needs them; --stage conditions, --stage reads "
        "and the objective conditioned may have them",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"optimizer steps in all (default: {TrainConfig.steps})")
    length.add_argument("--minutes", type=float, help="minutes of training in all, validation excluded")
    names = ", ".join(name for name in OBJECTIVES if name != "shown")  # which is that of --stage pictures
    parser.add_argument(
        "--objectives",
        type=parse_mixture,
        default=DEFAULT_OBJECTIVES,
        metavar="NAME[=WEIGHT],...",
        help=f"objectives and their weights: {names} (default: %(default)s)",
    )
    _add_canvas(parser)
    _add_optimization(parser)
    parser.add_argument(
        "--batch-size",
        type=int,
        help=f"stories in a step (default: {CPU_BATCH_SIZE}; on CUDA {TrainConfig.batch_size})",
    )
    parser.add_argument(
        "--micro-size",
        type=int,
        help=f"stories in a pass (default: {TrainConfig.micro_size}, to save padding; on CUDA the whole batch)",
    )
    parser.add_argument(
        "--valid-every",
        type=int,
        help=f"steps between validations (default: {VALID_EVERY}, and at each fifth of the run)",
    )
    parser.add_argument("--seed", type=int, default=TrainConfig.seed, help="random seed (default: %(default)s)")
    parser.add_argument("--wandb", action="store_true", help="also log to Weights & Biases")
    args = parser.parse_args(arguments)
    check_numbers(args, AT_MOST)
    _check_fractions(args)
    untouched = object()  # argparse fills only attributes that are missing: what differs from this was typed
    typed = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(vars(args), untouched)))
    for name in (name for name, value in vars(typed).items() if value is not untouched):
        if args.resume and name not in CHANGED_ON_RESUME:
            raise ConfigError(f"{_flag(name)} cannot be combined with --resume: only --steps and --minutes may change")
        if "canvas" not in args.objectives and name in OF_CANVAS:
            raise ConfigError(f"{_flag(name)} needs the objective canvas: it concerns random masks")
        if name == "input_noise" and "ar" not in args.objectives:
            raise ConfigError("--input-noise needs the objective ar: it replaces input tokens")
        if args.stage != "body" and name in OF_BODY:
            raise ConfigError(f"{_flag(name)} cannot be combined with --stage {args.stage}: the network is --init's")
    if args.stage != "body" and args.init is None:
        raise ConfigError(f"--stage {args.stage} needs --init RUN: the run whose network stays as it is")
    if "shown" in args.objectives:
        raise ConfigError("--objectives: shown is what --stage pictures trains on")
    if args.stage == "pictures" and args.pictures is None:
        raise ConfigError("--stage pictures needs --pictures DATA")
    if args.pictures and args.stage not in ("conditions", "pictures", "reads") and "conditioned" not in args.objectives:
        raise ConfigError("--pictures needs --stage conditions, pictures or reads, or the objective conditioned")
    if args.time_input and len(args.objectives) > 1:
        raise ConfigError("--time-input takes the objective canvas alone: other objectives have no diffusion time")
    return args


def _add_canvas(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--schedule", choices=["linear", "cosine"], default="linear", help="noise schedule (default: %(default)s)"
    )
    parser.add_argument(
        "--weighting",
        choices=["nelbo", "flat"],
        default=TrainConfig.weighting,
        help="loss weight of masked tokens over diffusion time (default: %(default)s)",
    )
    parser.add_argument(
        "--time-input",
        action="store_true",
        help="condition the network on diffusion time (the mask ratio already reveals it)",
    )


def _add_optimization(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--optimizer", choices=["adamw", "muon"], default=TrainConfig.optimizer, help="optimizer (default: %(default)s)"
    )
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in PEAK_RATES.items())
    parser.add_argument("--lr", type=float, help=f"peak learning rate (default: {rates})")
    parser.add_argument(
        "--cool-down",
        type=float,
        metavar="FRACTION",
        help="constant rate, then linear to 0 over this last fraction of the run (default: cosine decay)",
    )
    parser.add_argument(
        "--weight-decay",
        type=float,
        default=TrainConfig.weight_decay,
        help="weight decay of the body's matrices (default: %(default)s)",
    )
    parser.add_argument(
        "--dropout",
        type=float,
        default=TrainConfig.dropout,
        help="dropout on what each block adds to the residual stream (default: %(default)s)",
    )
    parser.add_argument(
        "--input-noise",
        type=float,
        metavar="FRACTION",
        default=TrainConfig.input_noise,
        help="replace this fraction of the input tokens in half of the ar stories (default: %(default)s)",
    )


def _check_fractions(args: argparse.Namespace) -> None:
    for name in FRACTIONS:
        if not 0 <= getattr(args, name) < 1:
            raise ConfigError(f"{_flag(name)} must be at least 0 and below 1, not {getattr(args, name)}")
    if not 0 <= args.weight_decay < math.inf:
        raise ConfigError(f"--weight-decay must be a number of at least 0, not {args.weight_decay}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
