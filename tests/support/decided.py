"""An untrained network decided enough that some drafts of its chain are kept: the drafter reads the same state."""

from dataclasses import replace

import torch

from host.model.network import Denoiser, config_named
from shared.tokens import EOS


def decided_network(vocab_size: int, canvas_len: int, depth: int) -> Denoiser:
    torch.manual_seed(2)
    shape = replace(
        config_named("debug"), vocab_size=vocab_size, canvas_len=canvas_len, time_input=False, draft_depth=depth
    )
    network = Denoiser(shape).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
        network.head.bias[EOS] -= 1.0
    return network
