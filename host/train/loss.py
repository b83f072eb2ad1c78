"""The training loss Σᵢ wᵢ · CE(logitsᵢ, targetᵢ) over the scored rows of a micro-batch, in nats.

With wᵢ = −α′(t) / (1 − α(t)) it is a Monte Carlo draw of the NELBO (Sahoo et al., MDLM, arXiv 2406.07524).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from host.model.network import Denoiser, without
from host.train.batches import MicroBatch
from shared.tokens import FIRST_TEXT_ID

CHUNKS = 8  # of the scored rows, on CUDA and in validation
CHUNK_ROWS = 64  # float32 scores of so many positions stay in a core's own cache
SCORED_ALIGNED = 64
"""oneDNN, which multiplies bf16 matrices on CPUs, compiles a kernel for every new shape, for milliseconds, and keeps
the last 1,024. With shapes as they fall, a third of a `tiny` step goes there; rounding leaves a few hundred distinct
shapes."""


class WeightedLoss(nn.Module):
    """Weighted cross-entropy of a micro-batch, summed, in nats. A module, so that torch can wrap and compile it."""

    def __init__(self, model: Denoiser, read_out: "type[HeadLoss | ChunkedHeadLoss] | None" = None) -> None:
        """read_out: LM head and loss in training; without one plain torch, whose scores (M, V) are whole."""
        super().__init__()
        self.model = model
        self.read_out = read_out
        self.on_cpu = read_out is HeadLoss

    def forward(self, batch: MicroBatch) -> Tensor:
        """The loss of a micro-batch.  → ()"""
        if self.on_cpu and torch.is_autocast_enabled("cpu"):
            batch = batch.padded(SCORED_ALIGNED)
        timed = self.model.config.time_input
        memory = None if batch.given is None else self.model.remember(batch.given)
        hidden = self.model(*batch.rows, at=batch.at, t=batch.t if timed else None, memory=memory)  # (M, D)
        head = self.model.head.weight, self.model.head.bias
        scored = Scored(hidden, self.model.never_control[batch.ends], batch.target, batch.weight)
        if self.read_out is None:
            return nats(head, *scored)
        if torch.is_grad_enabled():
            loss: Tensor = self.read_out.apply(*head, *scored)  # type: ignore[no-untyped-call]
            return loss
        return torch.stack([nats(head, *part) for part in in_chunks(scored)]).sum()


class Scored(NamedTuple):
    """The scored rows, as the losses take them."""

    hidden: Tensor  # (M, D)
    never: Tensor  # (M, FIRST_TEXT_ID) bool: control tokens that cannot stand there
    target: Tensor  # (M,)
    weight: Tensor  # (M,)


def nats(head: tuple[Tensor, Tensor], hidden: Tensor, *other: Tensor) -> Tensor:
    """Weighted cross-entropy, summed, in plain torch. head: weight (V, D) and bias (V,); then Scored.  → ()"""
    never, target, weight = other
    scores = without(F.linear(hidden, *head).float(), never)  # (M, V)
    return (F.cross_entropy(scores, target, reduction="none") * weight).sum()


def in_chunks(scored: Scored) -> Iterator[tuple[Tensor, ...]]:
    """In CHUNKS parts: their number is static, so that one compiled graph serves every M."""
    return zip(*(rows.tensor_split(CHUNKS) for rows in scored), strict=True)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The type that matrices are multiplied in where the tensor is."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


class HeadLoss(torch.autograd.Function):
    """LM head and weighted cross-entropy in one pass over the scores, for CPUs.

    The gradient is made where the loss is, a few rows at a time, instead of in a dozen passes over (M, V).
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, bias: Tensor, *scored: Tensor) -> Tensor:
        """weight (V, D), bias (V,), and `Scored`  → ()"""
        hidden, never, target, row_weight = scored
        dtype = autocast_dtype(hidden)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        scores = torch.addmm(bias.to(dtype), hidden, weight.T)  # (M, V), overwritten by its own gradient
        loss = torch.zeros(())
        for start in range(0, len(scores), CHUNK_ROWS):  # none where nothing is masked
            here = slice(start, start + CHUNK_ROWS)
            y, w = target[here, None], row_weight[here, None]
            part = scores[here].float()
            part[:, :FIRST_TEXT_ID].masked_fill_(never[here], -torch.inf)
            logp = part.log_softmax(-1)
            loss -= (logp.gather(1, y) * w).sum()
            scores[here] = logp.exp_().mul_(w).scatter_add_(1, y, -w)
        trained = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        ctx.save_for_backward(*((scores.T @ hidden, scores.sum(0)) if trained else (None, None)), scores @ weight)
        return loss

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        made = [None if saved is None else saved.float() * grad for saved in ctx.saved_tensors]  # type: ignore[attr-defined]
        return *made, None, None, None


class ChunkedHeadLoss(torch.autograd.Function):
    """LM head and weighted cross-entropy in CHUNKS parts, for CUDA: one of the parts' scores exist at a time.

    The gradient is made where the loss is, so that no score is kept for the backward pass or computed twice. What is
    kept are the gradients of weight, bias and hidden states. torch's own `linear_cross_entropy` does as much, but takes
    neither weights of rows nor tokens that cannot stand, and breaks the graph.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor, bias: Tensor, *scored: Tensor) -> Tensor:
        """As `HeadLoss.forward`."""
        hidden, *other = scored
        dtype, trained = autocast_dtype(hidden), ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        head, with_gradients = (weight.to(dtype), bias.to(dtype)), torch.func.grad_and_value(nats, (0, 1))
        loss, of_weight, of_bias, of_hidden = hidden.new_zeros(()), torch.zeros_like(weight), torch.zeros_like(bias), []
        for part in in_chunks(Scored(hidden.to(dtype), *other)):
            (of_head, of_rows), value = with_gradients(head, *part)
            loss, of_weight, of_bias = loss + value, of_weight + of_head[0], of_bias + of_head[1]
            of_hidden.append(of_rows)
        ctx.save_for_backward(*((of_weight, of_bias) if trained else (None, None)), torch.cat(of_hidden))
        return loss

    backward = HeadLoss.backward
