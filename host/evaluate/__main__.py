"""Measure a model on held-out text, or the texts that it writes.

`python -m host.evaluate` measures the newest run with the objective canvas on its validation stories: NELBO, bits per
byte, masked cross-entropy, with standard errors. --run names another run; every objective it has learned is measured:
the exact likelihood of the autoregressive law, nats per gap token of the infilling law, and with --drafts the tokens
per pass of its drafter. With --scorer and --samples or --sweep, texts are scored instead: generative perplexity,
entropy, distinct n-grams, repetition, lengths and non-words, beside as many stories of the data.

--conditions measures words and pictures: how many of those asked for occur in texts, and, of a run, its law given
them. With --bundle BUNDLE the texts are by the graphs that ship, and --scorer names the run that has the stories.

--bundle BUNDLE --drafts writes texts by the graphs that ship, each with drafting on and off: tokens per pass on
prompts, and with --scorer the same figures as above of texts without a prompt, by the bundle's defaults.
"""

import argparse
import math
from pathlib import Path
from typing import get_args

import msgspec

from host.data.shards import SplitName
from host.device import mixed_precision_dtype
from host.evaluate.bundle_conditions import evaluate_bundle
from host.evaluate.bundle_drafting import measure_drafting, print_bundle_drafting
from host.evaluate.conditions import COUNT as CONDITIONED_TEXTS
from host.evaluate.conditions import (
    GUIDANCES,
    evaluate_conditions,
    print_header,
    print_laws_given,
    print_left_out,
    print_told,
)
from host.evaluate.gen_ppl import COUNT, SampleScorer, print_scored, score_samples
from host.evaluate.laws import measure_laws, print_laws
from host.evaluate.likelihood import DRAWS, STORIES, evaluate, held_out_files, held_out_split, print_table
from host.evaluate.scorers import GraphScorer, Scorer, TorchScorer, load_graph
from host.evaluate.sweep import sweep
from host.files import check_numbers
from host.train.checkpoint import newest_run
from host.train.conditioner import conditioner_of
from host.train.run_folder import data_of, load_run, pictures_of
from shared.conditions import MAX_GUIDANCE
from shared.errors import ConfigError, run_main
from shared.manifest import TOKENIZER, find_graph, read_manifest, verified_bytes


def parse_arguments() -> argparse.Namespace:
    """The command line; ConfigError when flags do not go together."""
    parser = argparse.ArgumentParser(
        prog="python -m host.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m host.evaluate --run runs/tinystories --split test --json",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", type=Path, help="run folder (default: the newest in runs/)")
    what.add_argument("--bundle", type=Path, help="measure the CPU graphs of this bundle, as they ship")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--source", type=Path, help="text files to measure on, instead of the data of the run")
    text.add_argument(
        "--split",
        choices=get_args(SplitName),
        default="valid",
        help="of the data of the run: choose by valid, report test (default: %(default)s)",
    )
    parser.add_argument("--stories", type=int, help=f"evaluate on the first N stories (default: {STORIES})")
    parser.add_argument("--draws", type=int, help=f"Monte Carlo draws of every story (default: {DRAWS})")
    parser.add_argument("--scorer", type=Path, metavar="AR_RUN", help="run with objective ar that scores texts")
    sampled = parser.add_mutually_exclusive_group()
    sampled.add_argument("--samples", type=Path, help="score these: text files, or a run to sample from")
    sampled.add_argument("--sweep", action="store_true", help="score --run at many steps, selections, temperatures")
    parser.add_argument(
        "--count",
        type=int,
        help=f"texts of each setting (default: {COUNT}; with --conditions {CONDITIONED_TEXTS}, at most --stories)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument(
        "--drafts",
        action="store_true",
        help="also measure the drafter: tokens per pass, on texts that the run, or the bundle, writes",
    )
    parser.add_argument(
        "--conditions",
        action="store_true",
        help="measure words and pictures: how many of those asked for occur in texts, and the law given a condition",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        help=f"with --conditions: values to try (default: {' '.join(f'{one:g}' for one in GUIDANCES)})",
    )
    args = parser.parse_args()
    check_numbers(args, dict.fromkeys(("stories", "draws", "count"), math.inf))
    if args.guidance and not args.conditions:
        raise ConfigError("--guidance is about --conditions")
    if any(not 0 <= one <= MAX_GUIDANCE for one in args.guidance or ()):
        raise ConfigError(f"--guidance must be from 0 to {MAX_GUIDANCE:g}")
    if args.conditions:
        if args.samples or args.sweep or args.drafts or args.draws or args.source:
            raise ConfigError(
                "--conditions measures a run, or a bundle, on the data of a run: it goes with --split, --stories, "
                "--count, --guidance, --scorer and --json"
            )
        if args.bundle and not args.scorer:
            raise ConfigError("--bundle --conditions needs --scorer RUN, whose stories and pictures it asks for")
        return args
    if args.drafts and (args.samples or args.sweep):
        raise ConfigError("--drafts is about a run or a bundle: it cannot be combined with --samples or --sweep")
    if args.drafts and args.bundle:
        if args.draws or args.stories:
            raise ConfigError("--draws and --stories are about likelihoods: the number of texts is --count")
        if not (args.source or args.scorer):
            raise ConfigError("--bundle --drafts needs prompts: name --source FILES, or --scorer AR_RUN with its data")
        return args
    if not (args.samples or args.sweep):
        if args.scorer or args.count:
            raise ConfigError("--scorer and --count need --samples or --sweep")
        if args.bundle and args.source is None:
            raise ConfigError("--bundle needs --source: a bundle carries no text, name files to measure on")
        return args
    if args.scorer is None:
        raise ConfigError("--samples and --sweep need --scorer AR_RUN: train one with host.train --objectives ar")
    if args.draws or args.stories:
        raise ConfigError("--draws and --stories are about likelihoods: the number of samples is --count")
    if args.samples and (args.run or args.bundle):
        raise ConfigError("--samples names what is scored: it cannot be combined with --run or --bundle")
    if args.sweep and (args.bundle or args.json):
        raise ConfigError("--sweep measures a run, and prints one table")
    return args


def measure_likelihood(args: argparse.Namespace) -> None:
    """Print the figures of a run or a bundle on held-out text."""
    if args.bundle:
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
    stories = args.stories or STORIES
    if args.source:
        held_out = held_out_files(args.source, tokenizer, stories)
    else:
        held_out = held_out_split(data_of(run), stories, args.split)
    if not args.bundle and set(progress.objectives) != {"canvas"}:
        laws = measure_laws(model, progress, held_out=held_out, draws=args.draws or DRAWS, drafts=args.drafts)
        print(msgspec.json.encode(laws).decode()) if args.json else print_laws(laws, held_out)
        return
    result = evaluate(scorer, held_out, schedule, args.draws or DRAWS)
    if args.json:
        print(msgspec.json.encode(result).decode())
    else:
        print_table([result])


def measure_conditions(args: argparse.Namespace) -> None:
    """Print what a run or a bundle makes of words and pictures."""
    guidances, count = args.guidance or GUIDANCES, args.count or CONDITIONED_TEXTS
    stories, on_row = args.stories or STORIES, (lambda row: None) if args.json else print_told
    if args.bundle:
        of_bundle = evaluate_bundle(
            args.bundle,
            args.scorer,
            split=args.split,
            stories=stories,
            count=count,
            guidances=guidances,
            on_start=(lambda: None) if args.json else print_header,
            on_row=on_row,
        )
        print(msgspec.json.encode(of_bundle).decode()) if args.json else print_left_out(of_bundle)
        return
    run = args.run or newest_run()
    model, _ = load_run(run)
    if model.conditions is None:
        raise ConfigError(f"{run} takes no conditions: train them with host.train --stage conditions --init {run}")
    data = data_of(run)
    if not args.json:
        print_header()
    figures = evaluate_conditions(
        model,
        conditioner_of(data, pictures_of(run)),
        held_out=held_out_split(data, stories, args.split),
        count=count,
        guidances=guidances,
        scorer=SampleScorer.load(args.scorer, run / TOKENIZER) if args.scorer else None,
        dtype=mixed_precision_dtype(model.device),
        on_row=on_row,
    )
    if args.json:
        print(msgspec.json.encode(figures).decode())
        return
    print_left_out(figures)
    print_laws_given(figures.laws)


def main() -> None:
    """Evaluate a run, a bundle, or texts."""
    args = parse_arguments()
    if args.conditions:
        measure_conditions(args)
        return
    count = args.count or COUNT
    if args.sweep:
        sweep(args.run or newest_run(), args.scorer, source=args.source, split=args.split, count=count)
    elif args.bundle and args.drafts:
        found = measure_drafting(args.bundle, args.scorer, source=args.source, split=args.split, count=count)
        print(msgspec.json.encode(found).decode()) if args.json else print_bundle_drafting(found)
    elif args.samples:
        rows = score_samples(args.samples, args.scorer, source=args.source, split=args.split, count=count)
        if args.json:
            print(msgspec.json.encode(rows).decode())
        else:
            print_scored(rows)
    else:
        measure_likelihood(args)


if __name__ == "__main__":
    run_main(main)
