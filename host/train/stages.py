"""The stages of a run: which parameters are trained, on which stories, with which loss.

Stage A ("body") trains the network; "conditions" what makes a frozen network take words and pictures, "pictures" the
encoder of pictures alone, "reads" what blocks read of both encoders' memory; stage B ("drafter") the chain drafter of
a frozen network. Laws that a stage does not train stay as they are, to the bit.
"""

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from host.data.shards import Split
from host.data.words import COUNTED_STORIES
from host.model.drafter import frequent_tokens
from host.model.network import Denoiser
from host.train.distributed import Ranks
from host.train.draft_loss import ChainLoss
from host.train.loss import ChunkedHeadLoss, HeadLoss, WeightedLoss
from host.train.picture_loss import PictureLoss
from host.train.run_folder import Stage

PARTS: Final[dict[Stage, str]] = {
    "drafter": "drafter.",
    "conditions": "conditions.",
    "pictures": "conditions.pictures.",
    "reads": "conditions.reads.",
}
"""Stages that train one part of the network, whose names begin so, and freeze the rest."""

CONDITION_STAGES: Final = tuple((stage,) for stage, part in PARTS.items() if part.startswith("conditions."))
"""Objectives of those that leave network and drafter as they are, as a manifest has them."""


def freeze(model: Denoiser, stage: Stage) -> None:
    """Turn gradients off for all that the stage does not train."""
    for name, parameter in model.named_parameters():
        part = PARTS.get(stage)
        parameter.requires_grad_(not name.startswith("drafter.") if part is None else name.startswith(part))


def choose_drafts(model: Denoiser, text: Split) -> None:
    """Let the most frequent tokens of the first stories be what a draft can be."""
    assert model.drafter is not None
    counts = np.bincount(text.first(COUNTED_STORIES).ravel(), minlength=model.config.vocab_size)
    model.drafter.likely.copy_(frequent_tokens(torch.from_numpy(counts)))


def trained_mixture(stage: Stage, learned: Mapping[str, float]) -> dict[str, float]:
    """Each objective's share of the stories. A drafter trains on gaps in a fifth of them, if its network infills."""
    if stage == "body":
        return dict(learned)
    if stage in ("conditions", "reads"):
        return {"conditioned": 1.0}
    if stage == "pictures":
        return {"shown": 1.0}
    return {"ar": 0.8, "infill": 0.2} if "infill" in learned else {"ar": 1.0}


def training_loss(model: Denoiser, device: torch.device, ranks: Ranks, stage: Stage = "body") -> nn.Module:
    """The loss as this machine runs it best: compiled on CUDA, its gradients averaged over the processes.

    The body's loss is one graph for all objectives and steps (`MicroBatch.in_buckets`).
    """
    of_part: dict[Stage, Callable[[Denoiser], nn.Module]] = {"drafter": ChainLoss, "pictures": PictureLoss}
    read_out = HeadLoss if device.type == "cpu" else ChunkedHeadLoss
    loss = of_part[stage](model) if stage in of_part else WeightedLoss(model, read_out)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        loss.compile(dynamic=True, fullgraph=stage == "body")
    return loss if ranks.processes == 1 else DistributedDataParallel(loss, broadcast_buffers=False)
