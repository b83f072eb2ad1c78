"""Text from a trained run by the torch reference samplers: slow, for looking at a model before it is exported.

A run with the objective ar writes left to right, with drafts if it has a drafter. A run without it fills a canvas, and
so does one with both objectives when --steps, --selection or --max-tokens is given.
"""

import argparse
import math
import time
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer

from edge.decoding.layout_text import Layout, Texts
from edge.decoding.pictures import read_picture
from host.data.tokenizer import load_tokenizer
from host.model.conditions import PICTURE_SIZE, PICTURES, WORD_TOKENS, WORDS, Condition
from host.model.network import Denoiser
from host.sampling.blocks import write
from host.sampling.reference import TOP_K, Settings, sample
from host.train.checkpoint import newest_run
from host.train.run_folder import load_run
from shared.conditions import MAX_GUIDANCE
from shared.errors import ConfigError, RequestError, run_main
from shared.manifest import TOKENIZER, SamplingDefaults, Selection
from shared.messages import GenerateRequest, decode_request
from shared.tokens import BOS, EOS, PAD, words_go_on


def checked_request(args: argparse.Namespace, seed: int) -> GenerateRequest:
    """The flags as a request to the edge; RequestError names the field that it would refuse."""
    names = ("prompt", "steps", "temperature", "top_p", "max_tokens")
    fields = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):  # JSON would encode it as null
            raise RequestError("bad_request", f"`{name}` must be a number, not {value}")
    try:
        return decode_request(msgspec.json.encode(fields | {"seed": seed}))
    except UnicodeEncodeError:
        raise RequestError("bad_request", "the prompt is not UTF-8: check the terminal's locale") from None


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    usual = SamplingDefaults()
    parser = argparse.ArgumentParser(
        prog="python -m host.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example: python -m host.generate "Once upon a time" --seed 1 2 3 --steps 128',
    )
    parser.add_argument("prompt", nargs="?", default="", help="how the text begins (default: none)")
    parser.add_argument("--run", type=Path, help="run folder (default: the newest in runs/)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one text for each (default: 0)")
    parser.add_argument("--steps", type=int, help=f"denoising steps of a canvas (default: {usual.steps})")
    parser.add_argument(
        "--selection",
        choices=get_args(Selection),
        help=f"which positions of a canvas a step commits (default: {usual.selection})",
    )
    parser.add_argument(
        "--temperature", type=float, default=usual.temperature, help="0 takes the likeliest (default: %(default)s)"
    )
    parser.add_argument(
        "--top-p", type=float, default=usual.top_p, help="probability kept at each position (default: %(default)s)"
    )
    parser.add_argument(
        "--word", action="append", default=[], help="what to tell of, up to three times (default: none)"
    )
    parser.add_argument(
        "--image", action="append", default=[], type=Path, help="a picture of it, up to three times (default: none)"
    )
    parser.add_argument(
        "--guidance", type=float, default=0.0, help="how hard words and pictures pull (default: %(default)s)"
    )
    parser.add_argument("--max-tokens", type=int, help="length of a canvas's text at most (default: what fits)")
    return parser.parse_args()


def condition_of(args: argparse.Namespace, model: Denoiser, tokenizer: Tokenizer) -> Condition | None:
    """Of --word and --image; ConfigError where run or limits do not allow it, RequestError for a bad picture."""
    if not 0 <= args.guidance <= MAX_GUIDANCE:
        raise ConfigError(f"--guidance must be from 0 to {MAX_GUIDANCE:g}, not {args.guidance}")
    if not args.word and not args.image:
        if args.guidance:
            raise ConfigError("--guidance is about --word and --image: give one")
        return None
    if model.conditions is None:
        raise ConfigError("this run takes neither words nor pictures: train it with host.train --stage conditions")
    for flag, given, most in (("--word", args.word, WORDS), ("--image", args.image, PICTURES)):
        if len(given) > most:
            raise ConfigError(f"{flag} is given {len(given)} times: at most {most}")
    words = [tokenizer.encode(f" {word.strip().lower()}", add_special_tokens=False).ids for word in args.word]
    for word, tokens in zip(args.word, words, strict=True):
        if not word.strip() or len(tokens) > WORD_TOKENS:
            raise ConfigError(f"--word {word!r} has {len(tokens)} tokens: it must have 1 to {WORD_TOKENS}")
    try:
        shown = [read_picture(path.read_bytes(), str(path), PICTURE_SIZE) for path in args.image]
    except OSError as error:
        raise ConfigError(f"--image {error.filename} cannot be read: {error.strerror}") from None
    go_on = words_go_on(tokenizer.get_vocab())
    if not shown:
        return Condition(words, go_on=go_on)
    return Condition(words, torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2).float() / 255, go_on)


def print_written(
    model: Denoiser,
    texts: Texts,
    *,
    layout: Layout,
    prompt: list[int],
    settings: Settings,
    condition: Condition | None,
    guidance: float,
) -> None:
    """Print the text that continues a prompt left to right, and what it cost."""
    window = 0 if model.drafter is None else len(model.drafter.depths)
    started = time.perf_counter()
    written = write(
        model, [prompt], settings=settings, open_end=True, window=window, condition=condition, guidance=guidance
    )
    canvas = np.full(model.config.canvas_len, PAD)
    text = [BOS, *prompt, *written.gaps[0], EOS][: len(canvas)]
    canvas[: len(text)] = text
    tokens, passes = sum(written.kept), len(written.kept)
    print(
        f"{texts.read(layout, canvas)}\n— seed {settings.seed}, {tokens} tokens in {passes} passes, "
        f"{time.perf_counter() - started:.1f} s\n"
    )


def main() -> None:
    """Sample one text for each seed."""
    args, usual = parse_arguments(), SamplingDefaults()
    requests = [checked_request(args, seed) for seed in args.seed]
    run = args.run or newest_run()
    model, progress = load_run(run)
    tokenizer = load_tokenizer(run / TOKENIZER)
    condition = condition_of(args, model, tokenizer)
    texts = Texts(tokenizer, model.config.canvas_len)
    layout = texts.lay_out(requests[0])
    steps, selection = args.steps or usual.steps, args.selection or usual.selection
    top_k = min(TOP_K, model.config.vocab_size)
    settings = [Settings(seed, steps, selection, args.temperature, top_k, args.top_p) for seed in args.seed]
    canvas_flags = [name for name in ("steps", "selection", "max_tokens") if getattr(args, name) is not None]
    if canvas_flags and "canvas" not in progress.objectives:
        flag = f"--{canvas_flags[0].replace('_', '-')}"
        raise ConfigError(f"{flag} is for a canvas: {run} has not learned that objective")
    if "ar" in progress.objectives and not canvas_flags:
        given = layout.canvas[1:][~layout.fill[1:]].tolist()
        for one in settings:
            print_written(
                model, texts, layout=layout, prompt=given, settings=one, condition=condition, guidance=args.guidance
            )
        return
    if condition is not None:
        raise ConfigError("--word and --image are for text that is written left to right, not for a canvas")
    canvas, fill = torch.from_numpy(layout.canvas).long(), torch.from_numpy(layout.fill)
    for one in settings:
        started = time.perf_counter()
        sampled = sample(model, canvas, fill=fill, schedule=progress.schedule, settings=one)
        print(texts.read(layout, sampled.canvas.numpy()))
        print(f"— seed {one.seed}, {sampled.steps} denoising steps, {time.perf_counter() - started:.1f} s\n")


if __name__ == "__main__":
    run_main(main)
