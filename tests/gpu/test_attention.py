"""What `tests.gpu.attention` compares is the same attention, as far as a CPU computes FlexAttention: uncompiled."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from host.model.layouts import Gap, Rows, canvas, causal, drafts, evidence, stack
from host.model.network import config_named
from shared.tokens import EOS, MASK, PAD
from tests.gpu.attention import by_distance, by_tensor, gradients, inputs

LAYOUTS: dict[str, Rows] = {
    "causal": causal(torch.arange(24)[None]),
    "canvas": canvas(torch.tensor([[7, MASK, 8, EOS, PAD, PAD]])),
    "drafts": drafts(torch.arange(12)[None], torch.tensor([2, 5]), 3),
    "gaps, and padding": stack(
        [evidence([1, 9, 8, 7], [0, 5, 6, 7], [Gap(1, 1, [3, 4])]), causal(torch.arange(11)[None])], 16
    ),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch, as it traces
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_by_distance_is_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, with the gradient of the learned bias. torch refuses a backward pass on CPUs, which it computes."""
    monkeypatch.setattr(flex, "_validate_device", lambda query, key, value: None)
    rows = LAYOUTS[name]
    batch, n = rows.tokens.shape
    model, _, _ = inputs(replace(config_named("debug"), canvas_len=32), torch.device("cpu"), batch, torch.float32)
    qkv = torch.randn(3, batch, 2, n, 32, requires_grad=True)
    with torch.no_grad():
        model.relative_bias.add_(torch.randn_like(model.relative_bias))
    ours = gradients(by_tensor, model, rows, qkv)
    for expected, found in zip(ours, gradients(by_distance, model, rows, qkv), strict=True):
        assert float((found - expected).norm()) < 1e-5 * float(expected.norm())
