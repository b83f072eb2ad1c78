"""Run folders: a run's settings on disk, the layout of a new run, the resumption of an old one."""

import argparse
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

import msgspec
import torch

from host.data.pictures import load_pictures
from host.data.prepare import DEFAULT_OUT, DEFAULT_SOURCE, prepare
from host.data.shards import DataFolder, load_data
from host.data.tokenizer import identity_of
from host.device import best_device
from host.files import locked
from host.model.diffusion import Weighting
from host.model.drafter import DEPTH
from host.model.network import Denoiser, ModelConfig, config_named
from host.train.checkpoint import BEST, LAST, Progress, find_checkpoint, init_from, load_model, read_progress
from host.train.logging import LOG_FILE, read_log
from host.train.optim import PEAK_RATES, WEIGHT_DECAY, OptimizerName
from host.train.published import is_published, read_published
from shared.errors import ConfigError, DataError
from shared.manifest import TOKENIZER, TrainingStage

CONFIG_FILE = "config.json"
USUAL_SHAPE: Final = "small"
VALIDATION_SEED = 0x5EED
VALIDATION_DRAWS = 2
VALID_EVERY = 500  # steps
CPU_BATCH_SIZE = 16
LONGEST_STEP: Final = 4.0  # usual steps that one step counts for at most


@dataclass(frozen=True)
class Work:
    """Training cost of a run's weights, runs named by --init included."""

    compute_seconds: float = 0.0
    tokens: int = 0


Stage = Literal["body", "drafter", "conditions", "pictures", "reads"]
"""What is trained: the network, or with the network frozen its drafter, its reading of words and pictures, or the
encoder of pictures alone."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run other than the model's shape. minutes: ends the run instead of `steps`."""

    out: Path
    data: Path
    steps: int = 20_000
    minutes: float | None = None
    batch_size: int = 64
    micro_size: int = 8
    optimizer: OptimizerName = "muon"
    weighting: Weighting = "flat"
    lr: float = PEAK_RATES["muon"]
    warmup: float = 0.03  # fraction of the run
    cool_down: float | None = None  # last fraction of the run, in which the rate falls to 0; None: cosine
    weight_decay: float = WEIGHT_DECAY
    dropout: float = 0.0
    input_noise: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    valid_every: int | None = None  # steps; see validation_due
    valid_stories: int = 256  # in each of two samples
    seed: int = 0
    stage: Stage = "body"
    pictures: Path | None = None  # prepared, for the objective conditioned
    init: Path | None = None  # the run whose weights it started from
    init_work: Work | None = None  # cost of those weights
    init_stages: tuple[TrainingStage, ...] = ()  # what they went through, oldest first
    data_sha256: str = ""  # DataMeta.sha256 of what `data` held


def fraction_done(config: TrainConfig, progress: Progress) -> float:
    """Fraction of a run that is done: of its minutes if given, else of its steps."""
    if config.minutes is not None:
        return min(1.0, progress.seconds / (60 * config.minutes))
    return min(1.0, progress.step / config.steps)


def counted_seconds(elapsed: float, usual: float) -> tuple[float, float]:
    """Seconds that a step counts towards --minutes, and the new usual: a running mean of them.

    A step that waited for a suspended or suddenly busy machine counts like a few usual ones, so that the learning rate
    does not fall by the wait.
    """
    counted = min(elapsed, LONGEST_STEP * usual)
    return counted, counted if usual == math.inf else 0.9 * usual + 0.1 * counted


def validation_due(config: TrainConfig, before: Progress, after: Progress) -> bool:
    """Every `valid_every` steps and at the end; without it every 500 steps and at each fifth of the run."""
    fifths = [int(5 * fraction_done(config, progress)) for progress in (before, after)]
    if config.valid_every is not None:
        return after.step % config.valid_every == 0 or fraction_done(config, after) >= 1
    return after.step % VALID_EVERY == 0 or fifths[0] < fifths[1]


def work_behind(run: Path) -> Work:
    """Cost of the weights that a run or a published folder holds; DataError when it holds none."""
    if is_published(run):
        training = read_published(run).training
        return Work(training.compute_seconds, sum(stage.tokens for stage in training_stages(run)))
    progress, before = read_progress(find_checkpoint(run)), work_before(read_config(run))
    return Work(before.compute_seconds + progress.compute_seconds, before.tokens + progress.tokens_seen)


def training_stages(run: Path) -> tuple[TrainingStage, ...]:
    """The runs that a run's weights went through, oldest first; of a published folder those of conditions last.

    A run that has trained on nothing, as one made by host.join, is none of them.
    """
    if is_published(run):
        training = read_published(run).training
        return training.stages + training.condition_stages
    config, progress = read_config(run), read_progress(find_checkpoint(run))
    if progress.tokens_seen == 0 and config.init_stages:
        return config.init_stages
    objectives = tuple(progress.objectives) if config.stage == "body" else (config.stage,)
    stage = TrainingStage(name=run.resolve().name, objectives=objectives, tokens=progress.tokens_seen)
    return (*config.init_stages, stage)


def work_before(config: TrainConfig) -> Work:
    """Cost of the weights that a run started from."""
    return config.init_work or Work()


@contextmanager
def run_laid_out(args: argparse.Namespace, processes: int = 1) -> Iterator[tuple[TrainConfig, Progress]]:
    """The folder of a new run, or that of --resume, locked while the block runs.

    Prepares the data when the default folder is missing. Raises DiffusionLLMError before anything is written.
    """
    if args.resume:
        find_checkpoint(args.resume, LAST)
        with locked(args.resume, f"{args.resume} is in use by another process: wait for it"):
            yield resumed_run(args, processes)
        return
    if args.data == DEFAULT_OUT and not args.data.exists():
        prepare([DEFAULT_SOURCE], args.data)
    data = load_data(args.data, verify=True)
    config, progress = planned_run(args, data)
    check_share(config, processes)
    with fresh_folder(config.out):
        write_config(config, data.tokenizer_path)
        yield config, progress


@contextmanager
def fresh_folder(out: Path) -> Iterator[None]:
    """The folder of a new run, locked while the block runs; ConfigError when it is in use."""
    check_free(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the run folder {out} cannot be made: {error.strerror}") from None
    with locked(out, f"{out} is in use by another process: wait for it, or choose another --out"):
        check_free(out)  # again: a run may have finished in it before the lock was free
        yield


def check_share(config: TrainConfig, processes: int) -> None:
    """ConfigError when a batch has fewer stories than there are processes."""
    if config.batch_size < processes:
        raise ConfigError(f"--batch-size {config.batch_size} is too small to share among {processes} processes")


def check_free(out: Path) -> None:
    """ConfigError when a new run would overwrite something."""
    if any((out / file).exists() for file in (LAST, BEST)):
        raise ConfigError(f"{out} already holds a run: continue it with --resume {out}, or choose another --out")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / CONFIG_FILE).exists()):
        raise ConfigError(f"{out} exists and is no run: choose another --out")
    if (out / LOG_FILE).exists() and any(row["valid"] for row in read_log(out / LOG_FILE)):  # of a baseline
        raise ConfigError(f"{out} holds the log of a run that saved no weights: choose another --out")


def usual_batch_size() -> int:
    """Default batch size. Small on a CPU: for a fixed token budget, more steps train better."""
    return TrainConfig.batch_size if torch.cuda.is_available() else CPU_BATCH_SIZE


def usual_micro_size(batch_size: int) -> int:
    """Default micro-batch size. Small on a CPU, to save padding; on CUDA the whole batch."""
    return batch_size if torch.cuda.is_available() else TrainConfig.micro_size


def planned_run(args: argparse.Namespace, data: DataFolder) -> tuple[TrainConfig, Progress]:
    """Settings and first progress of the run that these flags describe; writes nothing."""
    batch_size = args.batch_size or usual_batch_size()
    learned = read_progress(find_checkpoint(args.init)) if args.init else None
    shape = first_shape(args.config, args.init, learned)
    config = TrainConfig(
        out=args.out or Path("runs") / f"{shape.name}-{datetime.now():%Y%m%d-%H%M%S}",
        data=args.data,
        steps=args.steps or TrainConfig.steps,
        minutes=args.minutes,
        batch_size=batch_size,
        micro_size=args.micro_size or usual_micro_size(batch_size),
        optimizer=args.optimizer,
        weighting=args.weighting,
        lr=args.lr or PEAK_RATES[args.optimizer],
        cool_down=args.cool_down,
        weight_decay=args.weight_decay,
        dropout=args.dropout,
        input_noise=args.input_noise,
        valid_every=args.valid_every,
        seed=args.seed,
        stage=args.stage,
        pictures=args.pictures,
        init=args.init,
        init_work=work_behind(args.init) if args.init else None,
        init_stages=training_stages(args.init) if args.init else (),
        data_sha256=data.meta.sha256,
    )
    objectives = args.objectives
    drafts = shape.draft_depth if "ar" in objectives else 0  # the drafter is kept while there is a law that it follows
    model = replace(shape, vocab_size=data.meta.vocab_size, time_input=args.time_input, draft_depth=drafts)
    model = replace(model, conditions="conditioned" in objectives)
    if args.stage != "body" and learned is not None:
        if "ar" not in learned.objectives:
            raise ConfigError(f"{args.init} did not learn the objective ar, which --stage {args.stage} builds on")
        if args.stage in ("pictures", "reads") and not learned.model.conditions:
            raise ConfigError(f"{args.init} takes no words: --stage {args.stage} comes after --stage conditions")
        new = {"draft_depth": DEPTH} if args.stage == "drafter" else {"conditions": True}
        model, objectives = replace(learned.model, **new), learned.objectives
    if args.pictures is not None:
        load_pictures(args.pictures, verify=True)
    if args.init:
        check_start(args.init, model, data)
    progress = Progress(
        model=model,
        objectives=objectives,
        schedule=args.schedule,
        tokenizer_sha256=data.meta.tokenizer_sha256,
        data_source=data.meta.source,
        data_licence=data.meta.licence,
        data_stories=len(data.train),
    )
    return config, progress


def first_shape(name: str | None, init: Path | None, learned: Progress | None) -> ModelConfig:
    """The shape of that name, or else that of the run to start from. ConfigError when the two differ."""
    if learned is None:
        return config_named(name or USUAL_SHAPE)
    if name is not None:
        ours, theirs = config_named(name), learned.model
        if (ours.d_model, ours.layers, ours.heads) != (theirs.d_model, theirs.layers, theirs.heads):
            raise ConfigError(f"--config {name} is another shape than {init} has, {theirs.name}: leave out --config")
    return learned.model


def check_start(run: Path, model: ModelConfig, data: DataFolder) -> None:
    """DataError when a run's weights do not fit the model or its tokenizer the data."""
    path = find_checkpoint(run)
    if read_progress(path).tokenizer_sha256 != data.meta.tokenizer_sha256:
        raise DataError(f"{run} was trained with another tokenizer than {data.path}")
    with torch.device("meta"):
        init_from(Denoiser(model), path)


def write_config(config: TrainConfig, tokenizer: Path | None = None) -> None:
    """Write the settings into the run folder, atomically, and copy the tokenizer; ConfigError when it cannot."""
    file, partial = config.out / CONFIG_FILE, config.out / "config.partial"
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(config, enc_hook=str)))
        partial.replace(file)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, config.out / TOKENIZER)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"the run folder {config.out} cannot be written: {error.strerror}") from None


def read_config(run: Path) -> TrainConfig:
    """A run's settings; DataError when they cannot be read."""
    try:
        return msgspec.json.decode(
            (run / CONFIG_FILE).read_bytes(), type=TrainConfig, dec_hook=lambda kind, value: kind(value)
        )
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{run / CONFIG_FILE} cannot be read: {error}") from None


def load_run(run: Path) -> tuple[Denoiser, Progress]:
    """A run's network with EMA weights, on the best device.

    DataError when the run's tokenizer is not the one it was trained with.
    """
    model, progress = load_model(find_checkpoint(run))
    file = run / TOKENIZER
    if not file.is_file() or identity_of(file) != progress.tokenizer_sha256:
        raise DataError(f"{file} is missing, or not the tokenizer that the run was trained with")
    return model.to(best_device()), progress


def data_of(run: Path, verify: bool = False) -> DataFolder:
    """The data a run was trained on; DataError when its data folder has changed, or nothing says where it lies."""
    if is_published(run):
        raise DataError(f"{run} does not say where the data of its training lies: name text files with --source")
    config = read_config(run)
    data = load_data(config.data, verify)
    if config.data_sha256 not in ("", data.meta.sha256):
        raise DataError(f"{config.data} holds other data than {run} was trained on: prepare it again from that text")
    return data


def pictures_of(run: Path) -> Path | None:
    """The prepared pictures that a run's conditions learned from, or those of the runs that it started from."""
    if is_published(run):
        return None
    config = read_config(run)
    if config.pictures is None and config.init is not None and config.init.is_dir():
        return pictures_of(config.init)
    return config.pictures


def resumed_run(args: argparse.Namespace, processes: int) -> tuple[TrainConfig, Progress]:
    """Settings and progress of an earlier run, with the new length if one is given."""
    last = find_checkpoint(args.resume, LAST)
    progress = read_progress(last)
    config = replace(read_config(args.resume), out=args.resume)
    check_share(config, processes)
    if data_of(args.resume, verify=True).meta.tokenizer_sha256 != progress.tokenizer_sha256:
        raise DataError(f"{config.data} has another tokenizer than the run {args.resume}: prepare its data again")
    if args.steps is not None or args.minutes is not None:  # written, so that the next resumption keeps it
        config = replace(config, steps=args.steps or config.steps, minutes=args.minutes)
        write_config(config)
    return config, progress
