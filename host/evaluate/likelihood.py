"""Measure a model on held-out text: NELBO, bits a byte, masked cross-entropy, each with its standard error.

`python -m host.evaluate` measures the newest diffusion run on its own validation split; an autoregressive run, named
with --run, by its exact likelihood. With --judge, samples are judged instead
(`host.evaluate.gen_ppl`), or the settings of sampling swept (`host.evaluate.sweep`).
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from host.data.shards import DataFolder, Split, SplitName
from host.data.sources import read_texts
from host.data.tokenizer import encode_stories, load_tokenizer, token_byte_lengths
from host.evaluate.scorers import GraphScorer, Scorer, TorchScorer, load_graph
from host.model.diffusion import Corrupted, corrupt, counted_tokens, low_discrepancy_times
from host.model.network import Denoiser
from host.progress import progress
from host.train.checkpoint import newest_run
from host.train.run_folder import data_of, load_run
from shared.errors import ConfigError, DataError
from shared.manifest import TOKENIZER, Evaluation, Figure, find_graph, read_manifest, verified_bytes
from shared.schedule import ScheduleName, loss_weight, mask_prob, time_of_masked_fraction
from shared.tokens import PAD

DRAWS = 8
STORIES = 512
"""Enough for an error of about one per cent; every story is scored 16 times."""
BOOTSTRAPS = 1000
SEED = 20_000


@dataclass(frozen=True)
class HeldOut:
    """Canvases to measure on, and what they stand for."""

    name: str
    canvases: np.ndarray  # (n, L) uint16
    token_bytes: np.ndarray  # (V,) bytes each id spells

    @property
    def text_bytes(self) -> np.ndarray:
        """Bytes of the text kept, of each story.  → (n,)"""
        spelled: np.ndarray = self.token_bytes[self.canvases].sum(1)
        return spelled


def evaluate(scorer: Scorer, held_out: HeldOut, schedule: ScheduleName, draws: int = DRAWS) -> Evaluation:
    """Every story `draws` times, each time at another t of a low-discrepancy set and with fresh masks.

    Standard errors add the Monte Carlo error over draws and a bootstrap over stories.
    """
    x0 = torch.from_numpy(held_out.canvases.astype(np.int64))
    n = len(x0)
    nelbo = np.zeros((draws, n))  # nats of each story
    masked, masked_tokens = np.zeros((draws, n)), np.zeros((draws, n))
    with progress(total=2 * draws * n, desc=scorer.name, unit=" canvases", unit_scale=True) as bar:
        for draw in range(draws):
            noise = np.random.default_rng((SEED, draw))
            t = np.array(low_discrepancy_times(n, noise.random()))[noise.permutation(n)]
            for rows, batch in _batches(x0, t, noise, schedule, scorer.batch_rows):
                times = t[rows].tolist()
                losses, row = scorer.losses(batch, x0[rows, : batch.xt.shape[1]], times)
                weights = np.array([loss_weight(schedule, value) for value in times])
                nelbo[draw, rows] = weights * _row_sums(losses, row, len(rows))
                bar.update(len(rows))
            for rows, batch in _batches(x0, t, noise, "cosine", scorer.batch_rows):
                clean = x0[rows, : batch.xt.shape[1]]
                text = Corrupted(batch.xt, batch.scored & (clean != PAD), batch.active_len)
                fractions = [mask_prob("cosine", value) for value in t[rows].tolist()]
                times = [time_of_masked_fraction(schedule, fraction) for fraction in fractions]
                losses, row = scorer.losses(text, clean, times)
                masked[draw, rows] = _row_sums(losses, row, len(rows))
                masked_tokens[draw, rows] = text.scored.sum(1).numpy()
                bar.update(len(rows))
    tokens = counted_tokens(x0).numpy()
    nats = ratio(nelbo, np.broadcast_to(tokens, nelbo.shape))
    bits = ratio(nelbo / np.log(2), np.broadcast_to(held_out.text_bytes, nelbo.shape))
    return Evaluation(
        graph=scorer.name,
        source=held_out.name,
        stories=n,
        text_tokens=int(tokens.sum()),
        text_bytes=int(held_out.text_bytes.sum()),
        nelbo_nats_per_token=nats,
        bits_per_byte=bits,
        masked_cross_entropy=ratio(masked, masked_tokens),
    )


def _batches(
    x0: Tensor, t: np.ndarray, noise: np.random.Generator, schedule: ScheduleName, size: int
) -> Iterator[tuple[np.ndarray, Corrupted]]:
    """Corrupted batches of rows of like length, cut to the longest."""
    whole = corrupt(x0, torch.from_numpy(noise.random(x0.shape, dtype=np.float32)), t.tolist(), schedule)
    for part in whole.active_len.argsort(stable=True).split(size):
        longest = int(whole.active_len[part].max())
        yield part.numpy(), Corrupted(whole.xt[part, :longest], whole.scored[part, :longest], whole.active_len[part])


def _row_sums(losses: Tensor, rows: Tensor, n: int) -> np.ndarray:
    sums: np.ndarray = np.bincount(rows.numpy(), weights=losses.double().numpy(), minlength=n)
    return sums


def ratio(above: np.ndarray, below: np.ndarray) -> Figure:
    """Sum over sum, over draws and stories (draws, n), with its standard error."""
    draws, n = above.shape
    total = below.sum()
    if total == 0:
        raise DataError("too little text to measure on: no token of it was masked; give more stories or --draws")
    value = above.sum() / total
    # Deviations from the common ratio, not ratios of parts: where text is little, a part may hold no masked token.
    deviation = (above - value * below) / total  # (draws, n)
    monte_carlo = deviation.sum(1).std(ddof=1) * np.sqrt(draws) if draws > 1 else 0.0
    stories = np.random.default_rng(SEED).integers(0, n, (BOOTSTRAPS, n))
    bootstrap = deviation.sum(0)[stories].sum(1).std()
    return Figure(float(value), float(np.hypot(monte_carlo, bootstrap)))


def held_out_files(source: Path, tokenizer_path: Path, stories: int | None = None) -> HeldOut:
    """Texts of a file or folder, through the model's tokenizer; DataError when there is none."""
    tokenizer = load_tokenizer(tokenizer_path)
    texts = list(itertools.islice(read_texts(source), stories))
    if not texts:
        raise DataError(f"{source} holds no text")
    canvases = encode_stories(tokenizer, texts)
    return HeldOut(source.name, canvases, token_byte_lengths(tokenizer))


def held_out_split(folder: DataFolder, stories: int | None = None, split: SplitName = "valid") -> HeldOut:
    """The first stories of a data folder's split: `valid` to choose by, `test` to report."""
    canvases: Split = getattr(folder, split)
    n = len(canvases) if stories is None else min(stories, len(canvases))
    lengths = token_byte_lengths(load_tokenizer(folder.tokenizer_path))
    return HeldOut(f"{folder.meta.source}, {split} split", canvases.take(np.arange(n)), lengths)


def print_table(evaluations: Sequence[Evaluation]) -> None:
    """One line a model: value ± standard error."""
    print(f"{'graph':32} {'NELBO, nats a token':>22} {'bits a byte':>18} {'masked cross-entropy':>22}")
    for e in evaluations:
        cells = [
            f"{f.value:.4f} ± {f.stderr:.4f}" for f in (e.nelbo_nats_per_token, e.bits_per_byte, e.masked_cross_entropy)
        ]
        print(f"{e.graph:32} {cells[0]:>22} {cells[1]:>18} {cells[2]:>22}")
    e = evaluations[0]
    print(f"on {e.source}: {e.stories:,} stories, {e.text_tokens:,} tokens, {e.text_bytes:,} bytes")


def print_likelihood(model: Denoiser, held_out: HeldOut, as_json: bool) -> None:
    """An autoregressive run's exact figures."""
    from host.evaluate.gen_ppl import likelihood

    nats, bits = likelihood(model, held_out)
    if as_json:
        print(msgspec.json.encode({"nats_per_token": nats, "bits_per_byte": bits}).decode())
        return
    print(f"autoregressive: {nats.value:.4f} ± {nats.stderr:.4f} nats a token, "
          f"{bits.value:.4f} ± {bits.stderr:.4f} bits a byte")  # fmt: skip
    print(f"on {held_out.name}: {len(held_out.canvases):,} stories, exact likelihood")


def judge_or_sweep(args: argparse.Namespace) -> None:
    """The command lines of --samples and --sweep."""
    from host.evaluate.gen_ppl import judge_samples, print_judged  # it builds on this module
    from host.evaluate.sweep import sweep

    if args.judge is None:
        raise ConfigError("--samples and --sweep need --judge AR_RUN: train one with host.train --objectives ar")
    if args.count is not None and args.count < 1:
        raise ConfigError("--count must be at least 1")
    if args.draws != DRAWS or args.stories != STORIES:
        raise ConfigError("--draws and --stories are about the bound: the number of samples is --count")
    if args.samples and (args.run or args.bundle):
        raise ConfigError("--samples names what is judged: neither --run nor --bundle goes with it")
    if args.sweep:
        if args.bundle or args.json:
            raise ConfigError("--sweep measures a run, and prints one table")
        sweep(args.run or newest_run(), args.judge, args.source, args.count or 16)
        return
    rows = judge_samples(args.samples, args.judge, args.source, args.count or 64)
    if args.json:
        print(msgspec.json.encode(rows).decode())
    else:
        print_judged(rows)


def main() -> None:
    """Evaluate a run or a bundle."""
    parser = argparse.ArgumentParser(
        prog="python -m host.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m host.evaluate --bundle bundle/tinystories --source valid.jsonl.gz --json",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", type=Path, help="run folder (default: the newest in runs/)")
    what.add_argument("--bundle", type=Path, help="measure this bundle's CPU graph, as it ships")
    parser.add_argument("--source", type=Path, help="text files to measure on (default: the run's validation split)")
    parser.add_argument(
        "--stories", type=int, default=STORIES, help=f"measure on at most so many, the first (default: {STORIES})"
    )
    parser.add_argument("--draws", type=int, default=DRAWS, help=f"Monte Carlo draws of every story (default: {DRAWS})")
    parser.add_argument("--judge", type=Path, metavar="AR_RUN", help="autoregressive run that scores samples")
    sampled = parser.add_mutually_exclusive_group()
    sampled.add_argument("--samples", type=Path, help="judge these: text files, or a run to sample from")
    sampled.add_argument("--sweep", action="store_true", help="judge --run at many steps, selections, temperatures")
    parser.add_argument("--count", type=int, help="texts to judge, of each setting (default: 64; in a sweep 16)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args()
    if args.draws < 1 or args.stories < 1:
        raise ConfigError("--draws and --stories must be at least 1")
    if args.samples or args.sweep:
        judge_or_sweep(args)
        return
    if args.judge or args.count is not None:
        raise ConfigError("--judge and --count need --samples or --sweep")
    if args.bundle:
        if args.source is None:
            raise ConfigError("--bundle needs --source: a bundle carries no text, name files to measure on")
        manifest = read_manifest(args.bundle)
        graph = find_graph(args.bundle, manifest, "cpu")
        verified_bytes(args.bundle, graph.file, graph.sha256)
        verified_bytes(args.bundle, TOKENIZER, manifest.tokenizer_sha256)
        scorer: Scorer = GraphScorer(graph.file, load_graph(args.bundle / graph.file))
        schedule, tokenizer = manifest.schedule, args.bundle / TOKENIZER
    else:
        run = args.run or newest_run()
        model, progress = load_run(run)
        scorer, schedule, tokenizer = TorchScorer(model), progress.schedule, run / TOKENIZER
    if args.source:
        held_out = held_out_files(args.source, tokenizer, args.stories)
    else:
        held_out = held_out_split(data_of(run), args.stories)
    if not args.bundle and "canvas" not in progress.objectives:
        print_likelihood(model, held_out, args.json)
        return
    result = evaluate(scorer, held_out, schedule, args.draws)
    if args.json:
        print(msgspec.json.encode(result).decode())
    else:
        print_table([result])
