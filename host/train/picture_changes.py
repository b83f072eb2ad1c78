"""Chance changes of pictures, so that an encoder learns things rather than drawings: shapes, lines, colours.

Flat coloured drawings become outlined ones, line drawings, silhouettes thinner or thicker, grey or strangely coloured:
what changes between drawing styles. n: pictures. All is done on ink, 1 − RGB: what is not drawn is 0.
"""

from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT: Final = 0.15  # of half the picture
SCALES: Final = (0.8, 1.4)  # of what is seen, against the whole
STRETCH: Final = (0.85, 1.18)
SHEAR: Final = 0.2
TURN: Final = 0.35  # radians
WOBBLE: Final = 0.08  # of half the picture: by how much the points of a 5 × 5 grid are moved
MIX: Final = 0.25  # of a colour that goes to another, or comes from it
STRENGTH: Final = (0.6, 1.15)  # of the ink
SWAPPED, GREY = 0.12, 0.15  # shares of the pictures: colours by another order of channels, none
REPAINTED: Final = 0.3  # of the pictures: each channel by a curve of its own, so that areas keep their edges alone
KNOTS: Final = 4  # of such a curve, behind the one at no ink
THINNER, THICKER = 0.1, 0.1
OUTLINED: Final = 0.45  # of the pictures; the next three are shares of these
BROAD, FLAT, HOLLOW = 0.4, 0.4, 0.2  # lines of two pixels, colours of four levels, lines alone
LEAST_EDGE: Final = 0.08  # difference of neighbours that is a line
BLURRED: Final = 0.15
COVERED: Final = 0.25  # of the pictures have a rectangle without ink
COVER: Final = (8, 28)  # its sides in pixels


def changed(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Each picture by chance moved, turned, mirrored, bent, redrawn and recoloured, on white.

    pixels (n, 3, S, S) in 0 … 1 → the same shape
    """
    n = len(pixels)
    ink = _moved(1 - pixels, rng)
    thinner, thicker, outlined, blurred = (_some(n, share, rng) for share in (THINNER, THICKER, OUTLINED, BLURRED))
    ink[thinner] = _least(ink[thinner])
    ink[thicker] = _most(ink[thicker])
    drawn = ink[outlined]
    lines = _lines(drawn, rng)
    flat, hollow = (_some(len(drawn), share, rng) for share in (FLAT, HOLLOW))
    drawn[flat] = (drawn[flat] * 3).round() / 3
    drawn[hollow] = 0
    ink[outlined] = drawn
    repainted = _some(n, REPAINTED, rng)
    ink[repainted] = _repainted(ink[repainted], rng)
    ink = _recoloured(ink, rng)
    ink[outlined] = torch.maximum(ink[outlined], lines)
    ink[blurred] = F.avg_pool2d(ink[blurred], 3, 1, 1)
    for i in _some(n, COVERED, rng).tolist():
        (top, left), (high, wide) = rng.integers(0, pixels.shape[2] - COVER[0], 2), rng.integers(*COVER, 2)
        ink[i, :, top : top + high, left : left + wide] = 0
    return 1 - ink


def _some(n: int, share: float, rng: np.random.Generator) -> Tensor:
    """Numbers of a random share of n."""
    return torch.from_numpy(np.flatnonzero(rng.random(n) < share))


def _moved(ink: Tensor, rng: np.random.Generator) -> Tensor:
    n = len(ink)
    turn, scale, shear = rng.uniform(-TURN, TURN, n), rng.uniform(*SCALES, n), rng.uniform(-SHEAR, SHEAR, n)
    mirrored = np.where(rng.random(n) < 0.5, -1.0, 1.0)
    tall = scale * rng.uniform(*STRETCH, n)
    shift = rng.uniform(-SHIFT, SHIFT, (n, 2))
    cosine, sine, across = np.cos(turn), np.sin(turn), scale * mirrored
    top = [cosine * across, cosine * shear - sine * tall, shift[:, 0]]
    matrix = np.stack([*top, sine * across, sine * shear + cosine * tall, shift[:, 1]], 1).reshape(n, 2, 3)
    grid = F.affine_grid(torch.from_numpy(matrix.astype(np.float32)), list(ink.shape), align_corners=False)
    points = torch.from_numpy(rng.uniform(-WOBBLE, WOBBLE, (n, 2, 5, 5)).astype(np.float32))
    bent = F.interpolate(points, size=ink.shape[2], mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    return F.grid_sample(ink, grid + bent, align_corners=False)  # zeros outside


def _least(ink: Tensor) -> Tensor:
    """The least of each pixel and its eight neighbours: by shifts, a fifth of the time of max_pool2d on a CPU."""
    for side in (2, 3):
        n, found = ink.shape[side] - 1, ink.clone()
        for to, of in ((0, 1), (1, 0)):
            part = found.narrow(side, to, n)
            torch.minimum(part, ink.narrow(side, of, n), out=part)
        ink = found
    return ink


def _most(ink: Tensor) -> Tensor:
    return 1 - _least(1 - ink)


def _lines(ink: Tensor, rng: np.random.Generator) -> Tensor:
    """Ink of lines where colours change.  (n, 3, S, S) → (n, 1, S, S)"""
    lines = (_most(ink) - _least(ink)).amax(1, keepdim=True)
    broad = _some(len(ink), BROAD, rng)
    lines[broad] = _most(lines[broad])
    black = torch.from_numpy(rng.uniform(1.2, 4, (len(ink), 1, 1, 1)).astype(np.float32))
    return ((lines - LEAST_EDGE) * black).clamp(0, 1)


def _repainted(ink: Tensor, rng: np.random.Generator) -> Tensor:
    """Each channel through a random curve that leaves no ink where there is none."""
    n = len(ink)
    curve = F.pad(torch.from_numpy(rng.random((n, 3, KNOTS), np.float32)), (1, 0))
    place = KNOTS * ink.flatten(2).clamp(0, 1)
    left = place.floor().clamp(max=KNOTS - 1).long()
    low, high = curve.gather(2, left), curve.gather(2, left + 1)
    return (low + (high - low) * (place - left)).view_as(ink)


def _recoloured(ink: Tensor, rng: np.random.Generator) -> Tensor:
    n = len(ink)
    mix = np.eye(3) + rng.uniform(-MIX, MIX, (n, 3, 3))
    for i in _some(n, SWAPPED, rng).tolist():
        mix[i] = mix[i][rng.permutation(3)]
    mix[_some(n, GREY, rng).numpy()] = 1 / 3
    mix *= rng.uniform(*STRENGTH, (n, 1, 1))
    return torch.bmm(torch.from_numpy(mix.astype(np.float32)), ink.flatten(2)).view_as(ink).clamp(0, 1)
