"""Whether drafts change a text: `python -m tests.stress.same_texts`. Every prompt and seed with and without them."""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from edge.config import default_bundle
from edge.serving.loaded_bundle import LoadedBundle
from shared.messages import GenerateRequest

NAMES: Final = ("Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue", "Tim", "Lucy")
OPENINGS: Final = (
    "Once upon a time, {} had",
    "One day, {} saw",
    "{} and Mom went to find",
    "There was a child named {} who loved",
    "In the morning {} took",
    "{} was sad about",
    "Every day {} played with",
    '"Look!" said {}. "I found',
    "At the park {} lost",
    "{} wanted",
)
THINGS: Final = ("a ball", "the dog", "a red car", "his hat", "a big tree", "the moon", "a cake", "a boat", "", "the")
PROMPTS: Final = [o.format(n) + f" {t}".rstrip() for t, n, o in itertools.product(THINGS, NAMES, OPENINGS)]


class Found(NamedTuple):
    """different: texts that drafts changed. passes: with drafts; without there are as many as tokens."""

    texts: int
    different: int
    tokens: int
    passes: int


def run(bundle: Path, *, prompts: int, seeds: int, max_tokens: int, say: Callable[[str], None]) -> Found:
    """At the bundle's own temperature."""
    loaded, found = LoadedBundle.load(bundle, "ort"), Found(0, 0, 0, 0)
    assert loaded.manifest.blocks is not None, "a bundle of blocks"
    for number, prompt in enumerate(PROMPTS[:: len(PROMPTS) // prompts][:prompts]):
        for seed in range(seeds):
            request = GenerateRequest(prompt=prompt, seed=seed, max_tokens=max_tokens, decode="blocks", window=0)
            alone = loaded.run(loaded.prepare(request))
            law = GenerateRequest(
                prompt=prompt, seed=seed, max_tokens=max_tokens, decode="blocks", window=loaded.manifest.blocks.window
            )
            drafted = loaded.run(loaded.prepare(law))
            differs = not np.array_equal(alone.canvas, drafted.canvas)
            found = Found(
                found.texts + 1,
                found.different + differs,
                found.tokens + drafted.generated_tokens,
                found.passes + drafted.steps,
            )
        if number % 100 == 99:
            say(f"{number + 1} prompts: {found}")
    loaded.close()
    return found


def main() -> int:
    """Exit 1 when a text differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.same_texts", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=default_bundle())
    parser.add_argument("--prompts", type=int, default=100, help="of 1,000 (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="of each prompt (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a text (default: %(default)s)")
    args = parser.parse_args()
    if not 1 <= args.prompts <= len(PROMPTS):
        parser.error(f"--prompts takes 1 to {len(PROMPTS)}")
    found = run(
        args.bundle,
        prompts=args.prompts,
        seeds=args.seeds,
        max_tokens=args.max_tokens,
        say=lambda line: print(line, flush=True),
    )
    per_pass = found.tokens / found.passes
    print(f"{found.texts} texts, {found.tokens} tokens, {per_pass:.2f} a pass: drafts changed {found.different} texts")
    return found.different > 0


if __name__ == "__main__":
    raise SystemExit(main())
