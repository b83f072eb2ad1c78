"""How large the inputs of linear layers get in rows of text: what the static scales of INT8 are chosen by."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from host.export.row_builder import LEVELS_U8, Ranges, activation_scale
from host.model.conditions import Given
from host.model.network import Denoiser
from host.train.objectives import Example, Settings, ar, infill

ROWS_KEPT: Final = 16  # of each sequence, to choose a range by
PARTS: Final = np.linspace(0.1, 1, 37).tolist()


@dataclass
class Observed:
    """Inputs of one layer: the least and the largest value of all, and some rows of every sequence."""

    low: float = 0.0
    high: float = 0.0
    some: list[NDArray[np.float32]] = field(default_factory=list)


def calibration_rows(stories: NDArray[np.uint16], learned: Collection[str], seed: int = 0) -> list[Example]:
    """Each story left to right, and with gaps drawn at random if the network fills gaps.  stories (n, L)"""
    x0, rng = torch.from_numpy(stories.astype(np.int64)), np.random.default_rng(seed)
    rows = ar.examples(x0, rng, Settings())
    return rows + infill.examples(x0, rng, Settings()) if "infill" in learned else rows


@torch.no_grad()
def observe(model: Denoiser, rows: Sequence[Example]) -> dict[str, Observed]:
    """What each linear layer of the blocks, the LM head and the conditions reads.  → by the layer's name"""
    found: dict[str, Observed] = {}

    def remember(name: str, x: Tensor) -> None:
        value, seen = x.reshape(-1, x.shape[-1]), found.setdefault(name, Observed())
        seen.low, seen.high = min(seen.low, float(value.min())), max(seen.high, float(value.max()))
        seen.some.append(value[:: max(1, len(value) // ROWS_KEPT)].cpu().numpy().copy())

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: remember(name, inputs[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(("blocks.", "head", "conditions."))
    ]
    for example in rows:
        memory = None if example.condition is None else model.remember(Given.of([example.condition]).to(model.device))
        model.head(model(*example.rows.to(model.device), memory=memory)[0, example.at])
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def best_ranges(model: Denoiser, observed: Mapping[str, Observed]) -> tuple[Ranges, list[str]]:
    """Of each layer's input the part of its whole range with which its output is least wrong, by the sum of squares.

    → ranges, and the layers by ‖error‖ / ‖output‖, the worst first
    """
    ranges, loss = {}, {}
    for name, seen in observed.items():
        inputs = torch.from_numpy(np.concatenate(seen.some))
        weight = model.get_parameter(f"{name}.weight").cpu()
        losses = [
            float((rounding_errors(inputs, part * seen.low, part * seen.high) @ weight.T).square().sum())
            for part in PARTS
        ]
        best = int(np.argmin(losses))
        ranges[name] = PARTS[best] * seen.low, PARTS[best] * seen.high
        loss[name] = losses[best] / max(float((inputs @ weight.T).square().sum()), 1e-12)
    return ranges, sorted(loss, key=lambda name: -loss[name])


def rounding_errors(values: Tensor, low: float, high: float) -> Tensor:
    """What rounding to the 256 levels of a range, and clipping to it, adds to values."""
    scale, zero = (float(number) for number in activation_scale(low, high))
    return ((values / scale).round().add(zero).clamp(0, LEVELS_U8) - zero) * scale - values
