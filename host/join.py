"""One run of two that trained different parts beside the same frozen network: `python -m host.join RUN RUN --out RUN`.

A drafter and conditions leave the network as it is, to the bit, and the encoder of pictures and what blocks read leave
each other: so they can be trained side by side. The result has the parts of both runs, and each run's of what its last
stage trained.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from host.model.network import Denoiser
from host.train.checkpoint import LAST, Progress, find_checkpoint, load_model, save_checkpoint
from host.train.optim import Ema
from host.train.run_folder import fresh_folder, read_config, training_stages, work_behind, write_config
from host.train.stages import PARTS
from shared.errors import DataError, run_main
from shared.manifest import TOKENIZER


def join(first: Path, second: Path, out: Path) -> Progress:
    """Write the run `out`; DataError when the two are not of one network, or one has all that the other has."""
    (one, progress), (other, added) = (load_model(find_checkpoint(run)) for run in (first, second))
    shape = replace(
        progress.model,
        draft_depth=progress.model.draft_depth or added.model.draft_depth,
        conditions=progress.model.conditions or added.model.conditions,
    )
    if progress.tokenizer_sha256 != added.tokenizer_sha256:
        raise DataError(f"{first} and {second} have different tokenizers")
    mine, theirs = one.state_dict(), other.state_dict()
    trained = [PARTS.get(read_config(run).stage, "") for run in (first, second)]
    both = mine.keys() & theirs.keys()
    apart = [name for name in both if not torch.equal(mine[name], theirs[name])]
    for name in apart:
        if sum(name.startswith(part) for part in trained if part) != 1:
            raise DataError(f"{first} and {second} did not start from the same network: {name} differs")
    if shape in (progress.model, added.model) and not apart:
        raise DataError(f"{first} and {second} have nothing to join: all that one has is in the other")
    by_second = {name: theirs[name] for name in apart if trained[1] and name.startswith(trained[1])}
    model = Denoiser(shape)
    model.load_state_dict(theirs | mine | by_second)
    joined, config = replace(added, model=shape), read_config(second)
    with fresh_folder(out):
        began = replace(config, init=first, init_work=work_behind(first), init_stages=training_stages(first))
        write_config(replace(began, out=out), second / TOKENIZER)
        ema, scaler = Ema(model, config.ema_decay), torch.amp.GradScaler("cpu", enabled=False)
        save_checkpoint(out / LAST, joined, model=model, ema=ema, optimizers=(), scaler=scaler)
    return joined


def main() -> None:
    """Join two runs."""
    parser = argparse.ArgumentParser(
        prog="python -m host.join",
        description="Make one run of two that trained different parts beside the same frozen network: a drafter and "
        "conditions, or the encoder of pictures and what blocks read of it.",
        epilog="example: python -m host.join runs/drafter runs/conditions --out runs/both",
    )
    parser.add_argument("first", type=Path, help="run folder")
    parser.add_argument("second", type=Path, help="run folder; the last stage of the result")
    parser.add_argument("--out", type=Path, required=True, help="run folder to make")
    args = parser.parse_args()
    joined = join(args.first, args.second, args.out)
    parts = " and ".join(["a drafter"] * bool(joined.model.draft_depth) + ["conditions"] * joined.model.conditions)
    print(f"{args.out}: {joined.model.name} with {parts}; python -m host.export --run takes it")


if __name__ == "__main__":
    run_main(main)
