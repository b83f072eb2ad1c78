"""One run of two that trained different parts beside the same frozen network: `python -m host.join RUN RUN --out RUN`.

A drafter and conditions leave the network as it is, to the bit, and the encoder of pictures and what blocks read leave
each other: so they can be trained side by side, also where the other part learns on meanwhile. The result has the
parts of both runs, each from the run that has trained it since they parted; it has gone through the stages of the
first, then through those of the second that the first lacks.
"""

import argparse
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from host.model.network import Denoiser
from host.train.checkpoint import LAST, Progress, find_checkpoint, load_model, read_progress, save_checkpoint
from host.train.optim import Ema
from host.train.published import is_published
from host.train.run_folder import Stage, Work, fresh_folder, read_config, training_stages, work_behind, write_config
from host.train.stages import PARTS
from shared.errors import DataError, run_main
from shared.manifest import TOKENIZER, TrainingStage


def join(first: Path, second: Path, out: Path) -> Progress:
    """Write the run `out`; DataError when the two are not of one network, have trained the same part since they parted,
    or one has all that the other has.
    """
    for one, other in ((first, second), (second, first)):
        if one.resolve() in {run.resolve() for run in runs_before(other)}:
            raise DataError(f"{other} goes on from {one} already, and has all that it has: there is nothing to join")
    (mine, progress), (theirs, added) = map(_weights_of, (first, second))
    shape = replace(
        progress.model,
        draft_depth=progress.model.draft_depth or added.model.draft_depth,
        conditions=progress.model.conditions or added.model.conditions,
    )
    if progress.tokenizer_sha256 != added.tokenizer_sha256:
        raise DataError(f"{first} and {second} have different tokenizers")
    apart = [name for name in mine if name in theirs and not torch.equal(mine[name], theirs[name])]
    by_first, by_second = stages_beside(first, second), stages_beside(second, first)
    for name in apart:
        here, there = ([stage for stage in by if name.startswith(PARTS[stage])] for by in (by_first, by_second))
        if here and there:
            part = max(here + there, key=lambda stage: len(PARTS[stage]))
            raise DataError(
                f"{first} and {second} have both trained {part}, and one of them would be lost: {name} differs"
            )
        if not here and not there:
            raise DataError(f"{first} and {second} did not start from the same network: {name} differs")
    if shape in (progress.model, added.model) and not apart:
        raise DataError(f"{first} and {second} have nothing to join: all that one has is in the other")
    parts = tuple(PARTS[stage] for stage in by_second)
    model = Denoiser(shape)
    model.load_state_dict(theirs | mine | {name: theirs[name] for name in apart if name.startswith(parts)})
    joined = replace(added, model=shape, step=0, tokens_seen=0, seconds=0.0, compute_seconds=0.0)
    known, config = training_stages(first), read_config(second)
    stages = (*known, *(stage for stage in training_stages(second) if stage not in known))
    work, more = work_behind(first), work_beside(second, known)
    work = Work(work.compute_seconds + more.compute_seconds, work.tokens + more.tokens)
    with fresh_folder(out):
        began = replace(config, init=first, init_work=work, init_stages=stages)
        write_config(replace(began, out=out), second / TOKENIZER)
        ema, scaler = Ema(model, config.ema_decay), torch.amp.GradScaler("cpu", enabled=False)
        save_checkpoint(out / LAST, joined, model=model, ema=ema, optimizers=(), scaler=scaler)
    return joined


def stages_beside(run: Path, other: Path) -> set[Stage]:
    """Of one part each, that a run has gone through and the other has not."""
    known = training_stages(other)
    names = {objective for stage in training_stages(run) if stage not in known for objective in stage.objectives}
    return {stage for stage in PARTS if stage in names}


def _weights_of(run: Path) -> tuple[dict[str, Tensor], Progress]:
    model, progress = load_model(find_checkpoint(run))
    return model.state_dict(), progress


def runs_before(run: Path) -> Iterator[Path]:
    """Those that it started from, newest first, as far as they are still there."""
    while not is_published(run):
        before = read_config(run).init
        if before is None or not before.is_dir():
            return
        run = before
        yield run


def work_beside(run: Path, known: Collection[TrainingStage]) -> Work:
    """Cost of the stages of a run that are not among `known`; where only their sum with others is, the last one's."""
    work, tokens = work_behind(run), sum(stage.tokens for stage in training_stages(run) if stage not in known)
    for before in runs_before(run):
        if set(training_stages(before)) <= set(known):
            at_start = work_behind(before)
            if work.tokens - at_start.tokens == tokens:
                return Work(work.compute_seconds - at_start.compute_seconds, tokens)
            break
    return Work(read_progress(find_checkpoint(run)).compute_seconds, tokens)


def main() -> None:
    """Join two runs."""
    parser = argparse.ArgumentParser(
        prog="python -m host.join",
        description="Make one run of two that trained different parts beside the same frozen network: a drafter and "
        "conditions, or the encoder of pictures and what blocks read of it.",
        epilog="example: python -m host.join runs/drafter runs/conditions --out runs/both",
    )
    parser.add_argument("first", type=Path, help="run folder")
    parser.add_argument("second", type=Path, help="run folder; its stages come last")
    parser.add_argument("--out", type=Path, required=True, help="run folder to make")
    args = parser.parse_args()
    joined = join(args.first, args.second, args.out)
    parts = " and ".join(["a drafter"] * bool(joined.model.draft_depth) + ["conditions"] * joined.model.conditions)
    print(f"{args.out}: {joined.model.name} with {parts}; python -m host.export --run takes it")


if __name__ == "__main__":
    run_main(main)
