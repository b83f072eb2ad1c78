"""Stage B: the chain drafter learns the frozen network's own law, by total variation.

A draft is kept where the law draws the same token with the same noise. That happens with a probability of at least
(1 − TV) / (1 + TV) (Gumbel coupling, arXiv 2408.07978), so TV is what is to fall; a little cross-entropy helps while
the two laws are far apart (DSpark, arXiv 2607.05147).
"""

import math
from typing import Final

import torch
from torch import Tensor, nn

from host.model.network import Denoiser
from host.train.batches import MicroBatch
from host.train.loss import CHUNK_ROWS, SCORED_ALIGNED
from shared.tokens import FIRST_TEXT_ID

CROSS_ENTROPY: Final = 0.1  # of the loss; the rest is TV
TEMPERATURES: Final = (0.7, 0.8, 1.0)  # at which the two laws are compared, by turns
DEPTH_DECAY: Final = 4.0


class ChainLoss(nn.Module):
    """Summed over all rows that can be the last kept one, and over depths, each of weight e^(−(k − 1) / 4)."""

    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch) -> Tensor:
        """→ ()"""
        if torch.is_autocast_enabled("cpu"):
            batch = batch.padded(SCORED_ALIGNED)
        assert self.model.drafter is not None
        with torch.no_grad():
            states = self.model(*batch.rows, at=batch.at)  # (M, D)
            law = self.model.logits(states, batch.ends)  # (M, V)
        number = torch.arange(len(batch.at), device=states.device)
        temperature = torch.tensor(TEMPERATURES, device=states.device)[(number + batch.target) % len(TEMPERATURES)]
        follows, state = one_after_another(batch), states
        weight = batch.weight.sign()
        loss = torch.zeros((), device=states.device)
        for depth, step in enumerate(self.model.drafter.depths):
            weight = weight * follows.roll(-depth)  # row j + depth + 1 stands one position after row j + depth
            state = step(state, self.model.token_embedding(batch.target.roll(-depth)))
            scaled = weight * math.exp(-depth / DEPTH_DECAY)
            there = (number + depth + 1) % len(number)
            target, head = batch.target[there], self.model.head
            loss = loss + DraftLoss.apply(  # type: ignore[no-untyped-call]
                state, head.weight, head.bias, law[there], target, scaled, temperature
            )
        return loss


def one_after_another(batch: MicroBatch) -> Tensor:
    """Whether the next scored row holds the next position of the same text.  → (M,) float32, 0 for the last"""
    b, n = batch.rows.tokens.shape
    position = batch.rows.positions.expand(b, n).flatten()[batch.at]
    following = (batch.at.roll(-1) == batch.at + 1) & (position.roll(-1) == position + 1) & (batch.weight.roll(-1) > 0)
    same = batch.at.roll(-1) // n == batch.at // n
    return (following & same).float()


class DraftLoss(torch.autograd.Function):
    """TV and cross-entropy of a draft, through the frozen LM head; the gradient is made where the loss is, in chunks.

    With q = softmax(z / T) and p the law at T: ∂TV/∂z = q (s − Σ q s) / T for s = sign(q − p) / 2, and that of the
    cross-entropy at T = 1 is softmax(z) − onehot.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        state: Tensor,  # (M, D)
        head: Tensor,  # (V, D)
        bias: Tensor,  # (V,)
        law: Tensor,  # (M, V) scores, −inf at what cannot stand
        target: Tensor,  # (M,)
        weight: Tensor,  # (M,)
        temperature: Tensor,  # (M,)
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(state.device.type) if torch.is_autocast_enabled(state.device.type) else None
        hidden, matrix = state.to(dtype or state.dtype), head.to(dtype or head.dtype)
        scores = torch.addmm(bias.to(matrix.dtype), hidden, matrix.T)  # (M, V), overwritten by its own gradient
        loss = torch.zeros((), device=state.device)
        for start in range(0, len(scores), CHUNK_ROWS):
            here = slice(start, start + CHUNK_ROWS)
            z, t, w, y = scores[here].float(), temperature[here, None], weight[here, None], target[here, None]
            z[:, :FIRST_TEXT_ID].masked_fill_(law[here, :FIRST_TEXT_ID].isinf(), -torch.inf)
            logq = z.log_softmax(-1)
            q, apart = (z / t).softmax(-1), (law[here] / t).softmax(-1)
            apart = q - apart
            loss += (w[:, 0] * ((1 - CROSS_ENTROPY) / 2 * apart.abs().sum(-1))).sum()
            loss -= CROSS_ENTROPY * (w * logq.gather(1, y)).sum()
            sign = apart.sign_().mul_(0.5)
            gradient = q * (sign - (q * sign).sum(-1, keepdim=True)) * ((1 - CROSS_ENTROPY) * w / t)
            gradient += logq.exp_().mul_(CROSS_ENTROPY * w)
            scores[here] = gradient.scatter_add_(1, y, -CROSS_ENTROPY * w)
        ctx.save_for_backward(scores @ matrix)
        return loss

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return saved.float() * grad, None, None, None, None, None, None
