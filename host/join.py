"""One run of two that trained different parts beside the same frozen network: `python -m host.join RUN RUN --out RUN`.

A drafter and conditions leave the network as it is, to the bit, so that they can be trained side by side. The result is
what the second would have been with --init FIRST.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from host.model.network import Denoiser
from host.train.checkpoint import LAST, Progress, find_checkpoint, load_model, save_checkpoint
from host.train.optim import Ema
from host.train.run_folder import fresh_folder, read_config, training_stages, work_behind, write_config
from shared.errors import DataError, run_main
from shared.manifest import TOKENIZER


def join(first: Path, second: Path, out: Path) -> Progress:
    """Write the run `out`; DataError when the two are not of one network, or both or neither have a part."""
    (one, progress), (other, added) = (load_model(find_checkpoint(run)) for run in (first, second))
    shape = replace(
        progress.model,
        draft_depth=progress.model.draft_depth or added.model.draft_depth,
        conditions=progress.model.conditions or added.model.conditions,
    )
    if shape in (progress.model, added.model):
        raise DataError(f"{first} and {second} have nothing to join: one has a drafter and conditions, or neither does")
    if progress.tokenizer_sha256 != added.tokenizer_sha256:
        raise DataError(f"{first} and {second} have different tokenizers")
    mine, theirs = one.state_dict(), other.state_dict()
    for name in mine.keys() & theirs.keys():
        if not torch.equal(mine[name], theirs[name]):
            raise DataError(f"{first} and {second} did not start from the same network: {name} differs")
    model = Denoiser(shape)
    model.load_state_dict(theirs | mine)
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
        description="Make one run of two: a drafter's and one with conditions, trained beside the same frozen network.",
        epilog="example: python -m host.join runs/drafter runs/conditions --out runs/both",
    )
    parser.add_argument("first", type=Path, help="run folder")
    parser.add_argument("second", type=Path, help="run folder; the last stage of the result")
    parser.add_argument("--out", type=Path, required=True, help="run folder to make")
    args = parser.parse_args()
    joined = join(args.first, args.second, args.out)
    print(f"{args.out}: {joined.model.name} with a drafter and conditions; python -m host.export --run takes it")


if __name__ == "__main__":
    run_main(main)
