"""What the machine at hand trains in, and what it says of it."""

import pytest
import torch

from host import device
from host.device import CpuDtype, CpuSpeeds, cpu_speeds, machine_of, mixed_precision_dtype

CPU = torch.device("cpu")
FLOAT32_FASTER, BF16_FASTER = CpuSpeeds(125.4, 74.6), CpuSpeeds(80.0, 160.0)


def pretend(monkeypatch: pytest.MonkeyPatch, speeds: CpuSpeeds | None) -> None:
    """A CPU with these speeds; None: without instructions for bf16, of which no product may be timed."""
    monkeypatch.setattr(device, "has_bf16_instructions", lambda: speeds is not None)
    monkeypatch.setattr(device, "cpu_speeds", lambda: speeds)


@pytest.mark.parametrize(
    ("speeds", "kept", "dtype"),
    [
        (FLOAT32_FASTER, None, None),
        (BF16_FASTER, None, torch.bfloat16),
        (FLOAT32_FASTER, "bfloat16", torch.bfloat16),
        (BF16_FASTER, "float32", None),
        (None, None, None),
        (None, "bfloat16", None),
    ],
)
def test_cpu_dtype_is_the_faster_or_that_of_the_run(
    speeds: CpuSpeeds | None, kept: CpuDtype | None, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, speeds)
    assert mixed_precision_dtype(CPU, kept) is dtype


def test_cpu_speeds_are_timed_once_and_draw_no_random_number() -> None:
    """Else the first run of a process would begin with other weights than the second."""
    cpu_speeds.cache_clear()
    before = torch.get_rng_state()
    speeds = cpu_speeds()
    assert torch.equal(torch.get_rng_state(), before)
    assert min(speeds) > 0
    assert cpu_speeds() is speeds


def test_machine_says_why_a_cpu_takes_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, FLOAT32_FASTER)
    assert machine_of(CPU, None).endswith(", float32 (products: float32 125, bf16 75 GFLOP/s)")
    pretend(monkeypatch, None)
    assert machine_of(CPU, None).endswith(", float32")
