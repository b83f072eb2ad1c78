"""Canvas sampling that masks committed tokens again: by chance, or by the network's left-to-right law as critic.

`python -m host.experiments.remask` writes texts; `python -m host.evaluate --samples` scores them. Every network call
counts as a pass, the critic's too. After the plain passes (`random` selection) come rounds: mask a fraction of a
text's tokens, fill them again in one pass. Which tokens is drawn without replacement, by the Gumbel-max trick, in
proportion to p^−w, p being a token's probability left to right. w = 0 masks by chance and asks no critic: remasking as
in ReMDM (Wang et al., arXiv 2503.00307), here of full canvases. w = ∞ masks the least likely. Ends stay.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from host.data.sources import STORY_SEPARATOR
from host.data.tokenizer import load_tokenizer
from host.device import mixed_precision_dtype
from host.files import check_numbers
from host.model.diffusion import autoregressive_nats
from host.model.layouts import first_end
from host.model.network import Denoiser
from host.progress import progress
from host.sampling.many import ROWS, open_canvas, scores
from host.sampling.reference import Settings, commit_pass, uniforms
from host.train.run_folder import load_run
from shared.errors import ConfigError, run_main
from shared.manifest import TOKENIZER, SamplingDefaults
from shared.schedule import ScheduleName
from shared.tokens import FIRST_TEXT_ID, MASK, PAD

MASKING: Final = 3  # domain of the noise, beside those of host.sampling.reference
FLAGS: Final = {
    "passes": "of a text in all",
    "plain": "passes before the rounds",
    "fraction": "of a text's tokens, masked in a round",
    "critic": "w; 0: by chance, inf: the least likely",
    "temperature": "of what is drawn, above 0",
}


@dataclass(frozen=True)
class Rule:
    """How a text's passes are spent. fraction: of its tokens, masked in a round. critic: w."""

    passes: int = 64
    plain: int = 32
    fraction: float = 0.1
    critic: float = 0.0
    temperature: float = SamplingDefaults().temperature

    @property
    def rounds(self) -> int:
        """How many the passes are enough for: one of a round fills, one is the critic's."""
        return (self.passes - self.plain) // (2 if self.critic else 1)


class Remasking:
    """Canvases that are sampled side by side, one for each seed, equal to those sampled alone up to rounding."""

    def __init__(self, model: Denoiser, schedule: ScheduleName, rule: Rule, seeds: Sequence[int]) -> None:
        self.model, self.schedule, self.rule = model, schedule, rule
        self.settings = [Settings(seed, steps=rule.plain, temperature=rule.temperature) for seed in seeds]
        self.canvases = torch.stack([open_canvas(model.config.canvas_len) for _ in seeds])  # (n, L)
        self.passes = self.step = 0  # step: passes without the critic's
        self._dtype = mixed_precision_dtype(model.device)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """→ (n, L)"""
        for _ in range(self.rule.plain):
            self._fill()
        for _ in progress(range(self.rule.rounds), desc="remasking", unit="round"):
            self._mask(self._surprise())
            self._fill()
        while bool((self.canvases == MASK).any()):  # where an end was drawn left of text
            self._fill()
        return self.canvases

    def _fill(self) -> None:
        """A pass of ordinary sampling: after the plain ones it commits all that is masked."""
        for rows in self._batches((self.canvases == MASK).any(1)):
            found = scores(self.model, self.schedule, list(self.canvases[rows]), self._dtype)
            for row, logp in zip(rows.tolist(), found, strict=True):
                masked = (self.canvases[row] == MASK).nonzero()[:, 0]
                commit_pass(self.canvases[row], masked, logp=logp, step=self.step, settings=self.settings[row])
        self.passes, self.step = self.passes + 1, self.step + 1

    def _surprise(self) -> Tensor:
        """−log p of each token left to right, by a pass; without a critic nothing surprises.  → (n, L)"""
        nats, device = torch.zeros(self.canvases.shape), self.model.device.type
        if not self.rule.critic:
            return nats
        for rows in self._batches(torch.ones(len(nats), dtype=torch.bool)):
            cut = self.canvases[rows][:, : int((self.canvases[rows] != PAD).sum(1).max())]
            with torch.autocast(device, self._dtype or torch.bfloat16, enabled=self._dtype is not None):
                nats[rows, : cut.shape[1]] = autoregressive_nats(self.model, cut)
        self.passes += 1
        return nats

    def _mask(self, nats: Tensor) -> None:
        """Mask the rule's fraction of each text, at least one token.  nats (n, L)"""
        for row, canvas in enumerate(self.canvases):
            text = (canvas >= FIRST_TEXT_ID).nonzero()[:, 0]
            score = nats[row, text].double()
            if self.rule.critic < math.inf:
                seed, token = self.settings[row].seed, torch.zeros_like(text)
                uniform = uniforms(seed, self.step, position=text, token=token, domain=MASKING)
                score = self.rule.critic * score - (-uniform.log()).log()
            count = min(len(text), max(1, round(self.rule.fraction * len(text))))
            canvas[text[score.topk(count).indices]] = MASK

    def _batches(self, wanted: Tensor) -> Sequence[Tensor]:
        """Rows of canvases of similar length, for a network call each.  wanted (n,) bool"""
        rows = wanted.nonzero()[:, 0]
        return rows[first_end(self.canvases[rows]).argsort(stable=True)].split(ROWS) if len(rows) else ()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    usual = Rule()
    parser = argparse.ArgumentParser(
        prog="python -m host.experiments.remask",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m host.experiments.remask --run bundle/tinystories-hf --critic 1 --out texts.txt",
    )
    parser.add_argument("--run", type=Path, required=True, help="run or published folder, of objectives ar and canvas")
    parser.add_argument("--out", type=Path, required=True, help="text file to write")
    for name, text in FLAGS.items():
        default = getattr(usual, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--count", type=int, default=200, help="texts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the first, the others count on (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Write the texts, and say how many passes each took."""
    args = parse_arguments()
    check_numbers(args, {"passes": 4096, "plain": args.passes, "fraction": 1, "temperature": 10, "count": 10**6})
    if not args.critic >= 0:
        raise ConfigError(f"--critic must be at least 0, not {args.critic}")
    model, state = load_run(args.run)
    if not {"canvas", "ar"} <= set(state.objectives):
        raise ConfigError(f"{args.run} did not learn both canvas and ar: they are the sampler and its critic")
    rule = Rule(**{name: getattr(args, name) for name in FLAGS})
    remasking = Remasking(model, state.schedule, rule, range(args.seed, args.seed + args.count))
    ids = [row[row >= FIRST_TEXT_ID].tolist() for row in remasking.sample()]
    texts = load_tokenizer(args.run / TOKENIZER).decode_batch(ids)
    args.out.write_text("".join(f"{text.strip()}\n{STORY_SEPARATOR}\n" for text in texts), "utf-8")
    print(f"{len(texts)} texts, {remasking.passes} passes each, {rule.rounds} rounds: {args.out}")


if __name__ == "__main__":
    run_main(main)
