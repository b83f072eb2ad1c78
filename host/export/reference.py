"""A trained network and what its graphs are compared on: held-out text, and canvases that sampling visits."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from host.evaluate.likelihood import HeldOut, nelbo_per_token
from host.evaluate.scorers import Canvases, TorchScorer
from host.export.cuda_graph import cuda_graph
from host.export.sensitivity import LayerError, layer_errors
from host.model.network import Denoiser
from host.sampling.reference import TOP_K, Settings, sample
from host.train.checkpoint import Progress
from shared.schedule import ScheduleName, time_of_masked_fraction
from shared.tokens import BOS, FIRST_TEXT_ID, MASK

PROMPT_TOKENS: Final = 8
CALIBRATION_STORIES: Final = 8
CALIBRATION_STEPS: Final = 32
STRATA: Final = 8  # bands of mask rates, each of which gives as many calibration canvases
CANVASES_OF_EACH: Final = 8
PARITY_STORIES: Final = 8
PARITY_STEPS: Final = 8
PARITY_NELBO_STORIES: Final = 64
CALIBRATION_SEED, PARITY_SEED = 1_000, 2_000


@dataclass(frozen=True)
class Reference:
    """canvases: for parity. calibration: for activation scales, as many of every mask rate. What is computed of them
    in float32 is computed once.
    """

    model: Denoiser
    progress: Progress
    held_out: HeldOut
    canvases: Canvases
    calibration: Canvases

    @cached_property
    def few(self) -> HeldOut:
        """The stories that parity in NELBO is measured on."""
        return replace(self.held_out, canvases=self.held_out.canvases[:PARITY_NELBO_STORIES])

    @cached_property
    def nelbo(self) -> float:
        """Nats per token of the network itself on `few`, in one draw."""
        return nelbo_per_token(TorchScorer(self.model), self.few, self.progress.schedule)

    @cached_property
    def likeliest(self) -> list[NDArray[np.int64]]:
        """The network's best token at each masked position of each parity canvas."""
        network = TorchScorer(self.model)
        return [network.logits(canvas, t).argmax(-1) for canvas, t in self.canvases]

    @cached_property
    def worst_first(self) -> list[LayerError]:
        """Linear layers by the error that INT8 makes in each alone."""
        return layer_errors(cuda_graph(self.model), self.calibration[::8])


def reference_of(model: Denoiser, progress: Progress, held_out: HeldOut) -> Reference:
    """Run the reference sampler: calibration starts from the first held-out stories, parity from the last."""
    stories = held_out.canvases
    first, last, schedule = stories[:CALIBRATION_STORIES], stories[-PARITY_STORIES:], progress.schedule
    visited = trajectories(model, first, schedule=schedule, seed=CALIBRATION_SEED, steps=CALIBRATION_STEPS)
    calibration = stratified(visited, STRATA, CANVASES_OF_EACH, CALIBRATION_SEED)
    canvases = trajectories(model, last, schedule=schedule, seed=PARITY_SEED, steps=PARITY_STEPS)
    return Reference(model, progress, held_out, canvases, calibration)


def trajectories(
    model: Denoiser, stories: NDArray[np.uint16], *, schedule: ScheduleName, seed: int, steps: int = 16
) -> list[tuple[NDArray[np.int32], float]]:
    """Canvases that sampling really visits: runs the reference sampler from story beginnings.

    stories (n, L): the first half of them give 8 tokens as a prompt, the rest only BOS.  → (canvas (L,), t) pairs
    """
    visited: list[tuple[NDArray[np.int32], float]] = []
    length = stories.shape[1]

    def remember(canvas: torch.Tensor) -> None:
        t = time_of_masked_fraction(schedule, float((canvas == MASK).sum()) / (length - 1))
        visited.append((canvas.numpy().astype(np.int32), t))

    for i, story in enumerate(stories):
        canvas = torch.full((length,), MASK)
        canvas[0] = BOS
        if i < len(stories) // 2:
            prompt = story[1 : 1 + PROMPT_TOKENS]
            canvas[1 : 1 + len(prompt)] = torch.from_numpy(np.maximum(prompt, FIRST_TEXT_ID).astype(np.int64))
        settings = Settings(seed=seed + i, steps=steps, top_k=min(TOP_K, model.config.vocab_size))
        sample(model, canvas, fill=canvas == MASK, schedule=schedule, settings=settings, on_pass=remember)
    return visited


def stratified(visited: Canvases, strata: int, each: int, seed: int) -> Canvases:
    """Of canvases that sampling visits, `each` from every band of mask rates, drawn by chance.

    Trajectories spend many steps where nearly all is masked, and skip whole bands when an end is drawn. A band
    with fewer canvases gives some of them more than once; one that was never visited gives none.
    """
    bands: list[list[tuple[NDArray[np.int32], float]]] = [[] for _ in range(strata)]
    for canvas, t in visited:
        masked = np.count_nonzero(canvas == MASK) / (canvas.size - 1)  # above 0, to 1
        bands[math.ceil(masked * strata) - 1].append((canvas, t))
    rng = np.random.default_rng(seed)
    return [band[i] for band in bands if band for i in rng.choice(len(band), each, replace=len(band) < each)]
