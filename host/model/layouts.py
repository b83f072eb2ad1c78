"""Attention layouts: which rows see which, in training and in decoding.

In the pictures lines are queries and columns keys; x: visible. Numbers under tokens are positions. The row at position
p scores the token of position p + 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.tokens import EOS, MASK, PAD


class Rows(NamedTuple):
    """What the network takes: `model(*rows)`."""

    tokens: Tensor  # (B, N) int64
    positions: Tensor  # (B or 1, N) int64
    visible: Tensor  # (B or 1, N, N) bool

    def to(self, device: torch.device) -> "Rows":
        """The same on a device."""
        return Rows(*(part.to(device) for part in self))


@dataclass(frozen=True)
class Gap:
    """A gap of the evidence layout: its left neighbour, its first position, and the tokens that stand in it so far."""

    left_token: int
    first: int
    tokens: Sequence[int] = ()


def first_end(canvas: Tensor) -> Tensor:
    """Position of the first visible EOS or PAD in each row, L where there is none.  (B, L) → (B,)"""
    length = canvas.shape[1]
    position = torch.arange(length, device=canvas.device)
    return torch.where((canvas == EOS) | (canvas == PAD), position, length).amin(1)


def causal(tokens: Tensor) -> Rows:
    """Every row sees itself and the rows before it: autoregressive text, prefill, the exact likelihood.

    ```
            a b c
            0 1 2
        a   x . .
        b   x x .
        c   x x x
    ```
    tokens (B, N), from position 0
    """
    n = tokens.shape[1]
    positions = torch.arange(n, device=tokens.device)
    return Rows(tokens, positions[None], (positions <= positions[:, None])[None])


def drafts(tokens: Tensor, anchors: Tensor, depth: int) -> Rows:
    """Causal clean rows, and after each anchor `depth` mask rows, which draft the tokens after the next.

    ```
                  a b c  M M  M M      anchors 0 and 1, depth 2
                  0 1 2  1 2  2 3
            a     x . .  . .  . .      clean rows never see a mask
            b     x x .  . .  . .
            c     x x x  . .  . .
        M after a x . .  x .  . .      the clean rows up to the anchor, and the masks before
        M         x . .  x x  . .
        M after b x x .  . .  x .
        M         x x .  . .  x x
    ```
    tokens (B, N) from position 0, anchors (A,): positions, the same in every row → N + A · depth rows
    """
    clean, n = causal(tokens), tokens.shape[1]
    step = torch.arange(depth, device=tokens.device)
    anchor, order = anchors.repeat_interleave(depth), step.repeat(len(anchors))
    group = torch.arange(len(anchors), device=tokens.device).repeat_interleave(depth)
    visible = torch.zeros(n + len(order), n + len(order), dtype=torch.bool, device=tokens.device)
    visible[:n, :n] = clean.visible[0]
    visible[n:, :n] = torch.arange(n, device=tokens.device) <= anchor[:, None]
    visible[n:, n:] = (group == group[:, None]) & (order <= order[:, None])
    masks = torch.full((len(tokens), len(order)), MASK, device=tokens.device)
    positions = torch.cat([clean.positions[0], anchor + order + 1])
    return Rows(torch.cat([tokens, masks], 1), positions[None], visible[None])


def evidence(tokens: Sequence[int], positions: Sequence[int], gaps: Sequence[Gap]) -> Rows:
    """Given text first, its rows see each other; then gap by gap a copy of the left neighbour and the gap's tokens.

    ```
                 a d  a b c      a [b c] d
                 0 3  0 1 2
            a    x x  . . .      the evidence, encoded once
            d    x x  . . .
        copy a   x x  x . .      scores b, whose row scores c: causal in this order
            b    x x  x x .
            c    x x  x x x
    ```
    tokens, positions: the evidence, at positions where every gap has its full size. A gap also sees the gaps before it.
    A gap's last token needs a row only if a later one is to see it.  → B = 1
    """
    row_tokens, row_positions = list(tokens), list(positions)
    for gap in gaps:
        row_tokens += [gap.left_token, *gap.tokens]
        row_positions += range(gap.first - 1, gap.first + len(gap.tokens))
    n = len(row_tokens)
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    visible[: len(tokens), : len(tokens)] = True
    return Rows(torch.tensor([row_tokens]), torch.tensor([row_positions]), visible[None])


def canvas(tokens: Tensor) -> Rows:
    """Everything sees everything up to the first visible end: full-canvas diffusion.

    ```
            a M E _      E: EOS, _: PAD
            0 1 2 3
        a   x x x .
        M   x x x .
        E   x x x .
        _   x x x .
    ```
    tokens (B, L)
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    seen = positions <= first_end(tokens)[:, None]
    return Rows(tokens, positions[None], seen[:, None].expand(-1, tokens.shape[1], -1))


def stack(parts: Sequence[Rows], multiple: int = 1) -> Rows:
    """Layouts of one sequence each as one batch: rows of padding, PAD, which no other row sees, up to the longest.

    multiple: the number of rows is rounded up to it. Where all sequences have the same positions, or all are causal,
    the batch shares one copy, so that the bias is computed once.
    """
    n = -(-max(part.tokens.shape[1] for part in parts) // multiple) * multiple
    tokens = torch.stack([F.pad(part.tokens[0], (0, n - part.tokens.shape[1]), value=PAD) for part in parts])
    longest = max((part.positions[0] for part in parts), key=len)
    if all(torch.equal(part.positions[0], longest[: part.positions.shape[1]]) for part in parts):
        positions = F.pad(longest, (0, n - len(longest)))[None]
    else:
        positions = torch.stack([F.pad(part.positions[0], (0, n - part.positions.shape[1])) for part in parts])
    triangle = torch.ones(n, n, dtype=torch.bool).tril()
    if all(torch.equal(part.visible[0], triangle[: len(part.visible[0]), : len(part.visible[0])]) for part in parts):
        return Rows(tokens, positions, triangle[None])
    visible = torch.eye(n, dtype=torch.bool).repeat(len(parts), 1, 1)
    for row, part in zip(visible, parts, strict=True):
        row[: len(part.visible[0]), : len(part.visible[0])] = part.visible[0]
    return Rows(tokens, positions, visible)
