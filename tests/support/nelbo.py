"""The bound that training, evaluation and the baseline estimate, written down once more and apart from them."""

import torch
from torch import Tensor

from host.model.diffusion import Corrupted, cross_entropy_at
from host.model.network import Denoiser
from shared.schedule import ScheduleName, loss_weight


def nelbo_sums(model: Denoiser, batch: Corrupted, *, x0: Tensor, t: list[float], schedule: ScheduleName) -> Tensor:
    """One Monte Carlo draw of each row's negative evidence lower bound, in nats (Sahoo et al., arXiv 2406.07524).

    The weight −alpha'/(1 − alpha) multiplies the *sum* over masked positions. Divide by `counted_tokens` for nats a
    token.  → (B,)
    """
    losses, rows = cross_entropy_at(model, batch, x0, t)
    weight = torch.tensor([loss_weight(schedule, value) for value in t], device=x0.device)
    return torch.zeros(x0.shape[0], device=x0.device).index_add(0, rows, losses * weight[rows])
