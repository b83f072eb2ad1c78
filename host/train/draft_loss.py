"""Stage B: the chain drafter learns the frozen network's own law, by total variation.

A draft is kept where the law draws the same token with the same noise. That happens with a probability of at least
(1 − TV) / (1 + TV) (Gumbel coupling, arXiv 2408.07978), so TV is minimized; a little cross-entropy helps while the two
laws are far apart (DSpark, arXiv 2607.05147).
"""

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from host.model.network import Denoiser
from host.train.batches import MicroBatch
from host.train.loss import CHUNK_ROWS, SCORED_ALIGNED, autocast_dtype
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
        drafter, head = self.model.drafter, self.model.head
        assert drafter is not None
        number = torch.arange(len(batch.at), device=batch.at.device)
        temperature = torch.tensor(TEMPERATURES, device=number.device)[(number + batch.target) % len(TEMPERATURES)]
        with torch.no_grad():
            states = self.model(*batch.rows, at=batch.at)  # (M, D)
            law = self.model.logits(states, batch.ends)  # (M, V)
            never = law[:, drafter.likely[drafter.likely < FIRST_TEXT_ID]].isinf()
        place = torch.full((self.model.config.vocab_size,), -1, device=number.device)  # of a token among the likely
        place[drafter.likely] = torch.arange(len(drafter.likely), device=number.device)
        matrix, bias = head.weight[drafter.likely], head.bias[drafter.likely]
        follows, state = one_after_another(batch), states
        weight = batch.weight.sign()
        loss = torch.zeros((), device=states.device)
        for depth, step in enumerate(drafter.depths):
            weight = weight * follows.roll(-depth)  # row j + depth + 1 stands one position after row j + depth
            state = step(state, self.model.token_embedding(batch.target.roll(-depth)))
            there = (number + depth + 1) % len(number)
            loss = loss + DraftLoss.apply(  # type: ignore[no-untyped-call]
                state,
                Drafted(
                    head=matrix,
                    bias=bias,
                    law=law,
                    likely=drafter.likely,
                    there=there,
                    never=never[there],
                    target=place[batch.target[there]],
                    weight=weight * math.exp(-depth / DEPTH_DECAY),
                    temperature=temperature,
                ),
            )
        return loss


@dataclass(frozen=True)
class Drafted:
    """What drafts of one depth are compared with. F: likely tokens, which a draft is one of."""

    head: Tensor  # (F, D)
    bias: Tensor  # (F,)
    law: Tensor  # (M, V) scores of all rows, −inf at what cannot stand
    likely: Tensor  # (F,) ascending ids
    there: Tensor  # (M,) row whose law a draft is to follow
    never: Tensor  # (M, C) bool: control tokens, the first of the likely, that cannot stand there
    target: Tensor  # (M,) among the likely, −1 where the text has another token
    weight: Tensor  # (M,)
    temperature: Tensor  # (M,)


def one_after_another(batch: MicroBatch) -> Tensor:
    """Whether the next scored row holds the next position of the same text.  → (M,) float32, 0 for the last"""
    b, n = batch.rows.tokens.shape
    position = batch.rows.positions.expand(b, n).flatten()[batch.at]
    following = (batch.at.roll(-1) == batch.at + 1) & (position.roll(-1) == position + 1) & (batch.weight.roll(-1) > 0)
    same = batch.at.roll(-1) // n == batch.at // n
    return (following & same).float()


class DraftLoss(torch.autograd.Function):
    """TV and cross-entropy of a draft, through the frozen LM head; the gradient is made where the loss is, in chunks.

    With q = softmax(z / T) over the likely tokens and p the law at T over all: ∂TV/∂z = q (s − Σ q s) / T for
    s = sign(q − p) / 2, and that of the cross-entropy at T = 1 is softmax(z) − onehot.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, state: Tensor, drafted: Drafted) -> Tensor:
        """state (M, D) → ()"""
        d, dtype = drafted, autocast_dtype(state)
        head = d.head.to(dtype)
        scores = torch.addmm(d.bias.to(dtype), state.to(dtype), head.T)  # (M, F), overwritten by its own gradient
        loss = torch.zeros((), device=state.device)
        for start in range(0, len(scores), CHUNK_ROWS):
            here = slice(start, start + CHUNK_ROWS)
            z, t, w, y = scores[here].float(), d.temperature[here, None], d.weight[here, None], d.target[here, None]
            z[:, : d.never.shape[1]].masked_fill_(d.never[here], -torch.inf)
            known = CROSS_ENTROPY * w * (y >= 0)
            y = y.clamp(min=0)
            logq, q = z.log_softmax(-1), (z / t).softmax(-1)
            p = (d.law[d.there[here]] / t).softmax(-1)[:, d.likely]
            apart = q - p
            tv = (apart.abs().sum(-1) + 1 - p.sum(-1)) / 2  # tokens that are not likely are in p alone
            loss += (1 - CROSS_ENTROPY) * (w[:, 0] * tv).sum()
            loss -= (known * logq.gather(1, y)).sum()
            sign = apart.sign_().mul_(0.5)
            gradient = q * (sign - (q * sign).sum(-1, keepdim=True)) * ((1 - CROSS_ENTROPY) * w / t)
            gradient += logq.exp_().mul_(known)
            scores[here] = gradient.scatter_add_(1, y, -known)
        ctx.save_for_backward(scores @ head)
        return loss

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the state."""
        (saved,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return saved.float() * grad, None
