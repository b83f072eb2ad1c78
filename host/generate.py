"""Text from a trained run by the torch reference sampler: slow, for looking at a model before it is exported."""

import argparse
import time
from pathlib import Path

import torch

from edge.text import Texts
from host.checkpoint import find_checkpoint, load_model, newest_run
from host.export import TOP_K
from host.sampler import Settings, sample
from host.tokenizer import load_tokenizer
from shared.errors import ConfigError, run_main
from shared.manifest import TOKENIZER, SamplingDefaults
from shared.messages import GenerateRequest


def main() -> None:
    """Sample one text for each seed."""
    defaults = SamplingDefaults()
    parser = argparse.ArgumentParser(
        prog="python -m host.generate",
        description=__doc__,
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
    if args.steps < 1 or args.temperature < 0 or not 0 < args.top_p <= 1 or min(args.seed) < 0:
        raise ConfigError("--steps must be at least 1, --temperature and --seed at least 0, --top-p in (0, 1]")
    run = args.run or newest_run()
    model, progress = load_model(find_checkpoint(run))
    texts = Texts(load_tokenizer(run / TOKENIZER), model.config.canvas_len)
    layout = texts.lay_out(GenerateRequest(prompt=args.prompt, max_tokens=args.max_tokens))
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
