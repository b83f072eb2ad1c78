"""Stage "pictures": the encoder of pictures learns to say what that of words says of the same concept.

Blocks read words already, so that a picture with a word's memory is told of as that word is, and no pass of the network
is needed to learn it. A word's memory is a row that stands for no word and its tokens; a picture's 16 rows are to be
these, each as often: softmax over copies is softmax over the rows.
"""

import torch
from torch import Tensor, nn

from host.model.conditions import PICTURE_ROWS
from host.model.network import Denoiser
from host.train.batches import MicroBatch
from shared.tokens import PAD


class PictureLoss(nn.Module):
    """Mean squared error of a picture's rows, summed over the pictures: of text i the picture and the word."""

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
            copied = torch.arange(PICTURE_ROWS, device=rows.device) * rows // PICTURE_ROWS  # (B, PICTURE_ROWS)
            target = wanted.gather(1, copied[..., None].expand(-1, -1, wanted.shape[2]))
        found = conditions.pictures(given.pixels)
        total: Tensor = (found.float() - target.float()).square().mean((1, 2)).sum()
        return total
