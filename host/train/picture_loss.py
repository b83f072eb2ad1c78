"""Stage "pictures": the picture encoder learns to output the memory that the word encoder makes of the same concept.

The blocks can read words already, so a picture with a word's memory acts like that word, and training needs no pass of
the network. A word's memory is a row that stands for no word, then its tokens; a picture's 16 rows are trained to be
these, each repeated equally often: softmax over copies is softmax over the rows, and few means of them are enough.

Squared error alone is slow to separate concepts, since without knowledge the best guess is their mean. A contrastive
loss is added (InfoNCE, Oord et al., arXiv 1807.03748): which of the batch's words is a picture's, where the score of a
word is minus the squared distance to its memory.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from host.model.conditions import PICTURE_GRID
from host.model.network import Denoiser
from host.train.batches import MicroBatch
from shared.tokens import PAD

SHARPNESS: Final = 10.0  # scores are in variances of the memories, times this
CONTRAST: Final = 0.05  # weight of the contrastive loss, in nats, beside the squared error


class PictureLoss(nn.Module):
    """Of text i the picture and the word: squared error and contrastive loss, summed over the pictures."""

    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch) -> Tensor:
        """→ ()"""
        given, conditions = batch.given, self.model.conditions
        assert given is not None and conditions is not None
        with torch.no_grad():
            wanted = conditions.encode(given._replace(pixels=given.pixels[:0]), self.model.word_rows(given.tokens))[0]
            rows = 1 + (given.tokens != PAD).sum(1, keepdim=True)  # (B, 1) of the word's memory
            copied = torch.arange(PICTURE_GRID, device=rows.device) * rows // PICTURE_GRID  # (B, PICTURE_GRID)
            target = wanted.gather(1, copied[..., None].expand(-1, -1, wanted.shape[2])).float()
        found = conditions.pictures(given.pixels).float()
        error = (found - target).square().mean((1, 2)).sum()
        same = (given.tokens[:, None] == given.tokens).all(2)  # (B, B)
        total: Tensor = error + CONTRAST * contrast(found.flatten(1), target.flatten(1), same)
        return total


def contrast(found: Tensor, words: Tensor, same: Tensor) -> Tensor:
    """Nats of choosing word i by picture i, summed over i. Of other pictures' words those that are the `same` are none.

    found, words (B, M), same (B, B) bool → ()
    """
    middle = words.mean(0)  # without it bf16 would round large products
    found, words = found - middle, words - middle
    apart = found.square().sum(1)[:, None] + words.square().sum(1) - 2 * found @ words.T
    spread = words.square().sum(1).mean() + 1e-6  # 0 where all are one
    others = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    scores = (-SHARPNESS * apart / spread).masked_fill(others, -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device), reduction="sum")
