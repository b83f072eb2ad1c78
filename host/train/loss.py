"""The training loss Σᵢ wᵢ · CE(logitsᵢ, targetᵢ) over the scored rows of a micro-batch, in nats.

With wᵢ = −α′(t) / (1 − α(t)) it is a Monte Carlo draw of the NELBO (Sahoo et al., MDLM, arXiv 2406.07524).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from host.model.network import Denoiser
from host.train.batches import MicroBatch
from shared.tokens import FIRST_TEXT_ID

CHUNK_ROWS = 64  # float32 scores of so many positions stay in a core's own cache
SCORED_ALIGNED = 64
"""oneDNN, which multiplies bf16 matrices on CPUs, compiles a kernel for every new shape, for milliseconds, and keeps
the last 1,024. With shapes as they fall, a third of a `tiny` step goes there; rounding leaves a few hundred distinct
shapes."""


class WeightedLoss(nn.Module):
    """Weighted cross-entropy of a micro-batch, summed, in nats. A module, so that torch can wrap and compile it."""

    def __init__(self, model: Denoiser, fused: bool) -> None:
        """fused: `HeadLoss` in training, for CPUs."""
        super().__init__()
        self.model = model
        self.fused = fused

    def forward(self, batch: MicroBatch) -> Tensor:
        """The loss of a micro-batch.  → ()"""
        if self.fused and torch.is_autocast_enabled("cpu"):
            batch = batch.padded(SCORED_ALIGNED)
        timed = self.model.config.time_input
        memory = None if batch.given is None else self.model.remember(batch.given)
        hidden = self.model(*batch.rows, at=batch.at, t=batch.t if timed else None, memory=memory)  # (M, D)
        if self.fused and torch.is_grad_enabled():
            head = self.model.head
            loss: Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
                hidden, head.weight, head.bias, self.model.never_control[batch.ends], batch
            )
            return loss
        logits = self.model.logits(hidden, batch.ends)  # (M, V)
        return (F.cross_entropy(logits, batch.target, reduction="none") * batch.weight).sum()


class HeadLoss(torch.autograd.Function):
    """LM head and weighted cross-entropy in one pass over the scores, for CPUs.

    The gradient is made where the loss is, a few rows at a time, instead of in a dozen passes over (M, V). On CUDA a
    compiler fuses the plain form.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,  # (M, D)
        weight: Tensor,  # (V, D)
        bias: Tensor,  # (V,)
        never: Tensor,  # (M, FIRST_TEXT_ID) bool: control tokens that cannot stand there
        batch: MicroBatch,
    ) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        scores = torch.addmm(bias.to(dtype), hidden, weight.T)  # (M, V), overwritten by its own gradient
        loss = torch.zeros(())
        for start in range(0, len(scores), CHUNK_ROWS):  # none where nothing is masked
            here = slice(start, start + CHUNK_ROWS)
            target, row_weight = batch.target[here, None], batch.weight[here, None]
            part = scores[here].float()
            part[:, :FIRST_TEXT_ID].masked_fill_(never[here], -torch.inf)
            logp = part.log_softmax(-1)
            loss -= (logp.gather(1, target) * row_weight).sum()
            scores[here] = logp.exp_().mul_(row_weight).scatter_add_(1, target, -row_weight)
        frozen = not ctx.needs_input_grad[1]  # type: ignore[attr-defined]
        ctx.save_for_backward(scores @ weight, *(() if frozen else (scores.T @ hidden, scores.sum(0))))
        return loss

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        made = [saved.float() * grad for saved in ctx.saved_tensors]  # type: ignore[attr-defined]
        return *made, *[None] * (5 - len(made))
