"""Infilling by an exact law: gaps given the text on both sides, in the evidence layout (AC-GPT, arXiv 2606.14943).

What follows a gap is laid out as if the gap were full; where its text is shorter (half of the gaps), EOS closes it. In
some stories the last gap is open: it ends with the story.
"""

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor

from host.model.layouts import Gap, evidence
from host.model.network import NO_PADDING
from host.train.objectives.example import Example, Settings, story
from shared.tokens import EOS

MOST_GAPS: Final = 6
LONGEST_GAP: Final = 64
LARGEST_SHARE: Final = 0.6  # of a story's text in gaps
LONGEST_SLACK: Final = 32
SLACK_GAPS: Final = 0.5
OPEN_ENDS: Final = 0.2  # of the stories


def examples(x0: Tensor, rng: np.random.Generator, settings: Settings) -> list[Example]:
    """x0 (n, L); stories of fewer than three tokens are left out."""
    stories = (story(canvas) for canvas in x0)
    return [gapped(tokens.tolist(), rng, length=x0.shape[1]) for tokens in stories if len(tokens) > 3]


def gapped(
    tokens: list[int],
    rng: np.random.Generator,
    *,
    length: int,
    most_gaps: int = MOST_GAPS,
    open_ends: float = OPEN_ENDS,
    slack_gaps: float = SLACK_GAPS,
) -> Example:
    """A story with random gaps, whose tokens are the targets. length: positions of the canvas.

    open_ends: share of stories whose last gap is open. slack_gaps: share of gaps with more positions than tokens.
    """
    ends = tokens[-1] == EOS
    opened = ends and rng.random() < open_ends
    text = tokens[1:-1] if ends else tokens[1:]
    sizes = _sizes(len(text), int(rng.integers(1, most_gaps + 1)), rng)
    given = len(text) - sum(sizes)
    # Gap i stands after `after[i]` given tokens, no two in one place; an open one after all of them.
    after = np.sort(rng.choice(given + (not opened), len(sizes) - opened, replace=False)).tolist() + [given] * opened
    room = length - len(tokens)
    gaps: list[Gap] = []
    targets: list[int] = []
    seen, places = [tokens[0]], [0]
    source, position = 1, 1
    for i, (size, start) in enumerate(zip(sizes, after, strict=True)):
        more = start - (len(seen) - 1)
        seen, places = seen + tokens[source : source + more], places + list(range(position, position + more))
        source, position = source + more, position + more
        inside, slack = tokens[source : source + size], min(room, _slack(rng, slack_gaps))
        if opened and i == len(sizes) - 1:
            inside, slack = [*inside, EOS], 0
        elif slack:
            room -= slack
            inside = [*inside, EOS]
        gaps.append(Gap(seen[-1], position, inside[:-1]))
        targets += inside
        source, position = source + size, position + size + slack
    rest = [] if opened else tokens[source:]
    rows = evidence(seen + rest, places + list(range(position, position + len(rest))), gaps)
    at = torch.arange(len(seen) + len(rest), rows.tokens.shape[1])
    ends_here = torch.full_like(at, NO_PADDING)
    return Example(rows, at, torch.tensor(targets), torch.ones(len(at)), ends_here, len(at))


def _sizes(text: int, most: int, rng: np.random.Generator) -> list[int]:
    """Sizes of one to `most` gaps: half of them log-uniform, so that short ones are frequent."""
    sizes: list[int] = []
    for _ in range(most):
        short = rng.random() < 0.5
        size = int(math.exp(rng.uniform(0, math.log(LONGEST_GAP + 1)))) if short else int(rng.integers(8, LONGEST_GAP))
        size = min(size, max(1, int(LARGEST_SHARE * text)) - sum(sizes))
        if 0 < size <= text - sum(sizes) - len(sizes):  # each gap but one needs a given token to stand after
            sizes.append(size)
    rng.shuffle(sizes)
    return sizes


def _slack(rng: np.random.Generator, share: float) -> int:
    """Extra positions of a gap: log-uniform in this share of the gaps, else 0."""
    return 0 if rng.random() >= share else int(math.exp(rng.uniform(0, math.log(LONGEST_SLACK + 1))))
