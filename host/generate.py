"""Text from a trained run by the torch reference sampler: slow, for looking at a model before it is exported.

An autoregressive run writes token by token, from the whole vocabulary.
"""

import argparse
import math
import time
from pathlib import Path

import msgspec
import torch

from edge.decoding.layout_text import Texts
from host.data.tokenizer import load_tokenizer
from host.sampling.many import sample_autoregressive
from host.sampling.reference import TOP_K, Settings, sample
from host.train.checkpoint import newest_run
from host.train.run_folder import load_run
from shared.errors import ConfigError, RequestError, run_main
from shared.manifest import TOKENIZER, SamplingDefaults
from shared.messages import GenerateRequest, decode_request
from shared.tokens import FIRST_TEXT_ID


def checked_request(args: argparse.Namespace, seed: int) -> GenerateRequest:
    """The flags as the edge would take them; raises RequestError naming what it would refuse."""
    fields = {name: getattr(args, name) for name in ("prompt", "steps", "temperature", "top_p", "max_tokens")}
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):  # JSON has no such numbers, and would say null
            raise RequestError("bad_request", f"`{name}` must be a number, not {value}")
    try:
        return decode_request(msgspec.json.encode(fields | {"seed": seed}))
    except UnicodeEncodeError:
        raise RequestError("bad_request", "the prompt is not UTF-8: check the terminal's locale") from None


def main() -> None:
    """Sample one text for each seed."""
    defaults = SamplingDefaults()
    parser = argparse.ArgumentParser(
        prog="python -m host.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example: python -m host.generate "Once upon a time" --seed 1 2 3 --steps 128',
    )
    parser.add_argument("prompt", nargs="?", default="", help="how the text begins (default: nothing)")
    parser.add_argument("--run", type=Path, help="run folder (default: the newest in runs/)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one text for each (default: 0)")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument(
        "--selection", choices=["confidence", "random", "margin", "entropy"], default=defaults.selection
    )
    parser.add_argument("--temperature", type=float, default=defaults.temperature)
    parser.add_argument("--top-p", type=float, default=defaults.top_p)
    parser.add_argument("--max-tokens", type=int)
    args = parser.parse_args()
    requests = [checked_request(args, seed) for seed in args.seed]
    run = args.run or newest_run()
    model, progress = load_run(run)
    texts = Texts(load_tokenizer(run / TOKENIZER), model.config.canvas_len)
    layout = texts.lay_out(requests[0])
    if "canvas" not in progress.objectives:
        for name in ("steps", "selection", "top_p", "max_tokens"):
            if getattr(args, name) != parser.get_default(name):
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} does not go with {run}: an autoregressive run draws one token at a time")
        prompt = layout.canvas[1:][~layout.fill[1:]].tolist()
        for seed in args.seed:
            (written,) = sample_autoregressive(model, [seed], args.temperature, prompt=prompt).numpy()
            print(f"{texts.read(layout, written)}\n— seed {seed}, {(written >= FIRST_TEXT_ID).sum()} tokens\n")
        return
    canvas, fill = torch.from_numpy(layout.canvas).long(), torch.from_numpy(layout.fill)
    for seed in args.seed:
        settings = Settings(
            seed, args.steps, args.selection, args.temperature, min(TOP_K, model.config.vocab_size), args.top_p
        )
        started = time.perf_counter()
        sampled = sample(model, progress.schedule, canvas, fill, settings)
        print(texts.read(layout, sampled.canvas.numpy()))
        print(f"— seed {seed}, {sampled.steps} passes, {time.perf_counter() - started:.1f} s\n")


if __name__ == "__main__":
    run_main(main)
