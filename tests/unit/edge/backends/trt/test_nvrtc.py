"""CUDA's own compiler takes the kernels, for the Jetson and for larger GPUs. It needs neither GPU nor driver."""

import importlib.util

import pytest

from edge.backends.trt import kernels
from shared.errors import DeviceError

PRESENT = bool(importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"))

pytestmark = [
    pytest.mark.proof("3. NVRTC compiles the kernels for sm_87 and sm_90"),
    pytest.mark.skipif(not PRESENT, reason="cuda-bindings is not installed (pip: diffusion-llm[trtcheck])"),
]


@pytest.mark.parametrize("architecture", ["sm_87", "sm_90"])
def test_compile_kernels_for_each_architecture(architecture: str) -> None:
    """Without a warning; to an ELF of that architecture that holds every entry point."""
    cubin = kernels.compile_kernels(architecture)
    assert cubin[:4] == b"\x7fELF"
    assert architecture.encode() in cubin
    blocks = (kernels.PREPARE, kernels.DRAW_ROWS, kernels.KEEP, kernels.APPEND)
    drafting = (kernels.DRAFT_INPUT, kernels.DRAFT_LINEAR, kernels.DRAFT_TOKEN)
    for name in (kernels.DRAW, kernels.COMMIT, *blocks, *drafting):
        assert name.encode() in cubin
    every = [chr(code) for code in range(128)]
    assert [letter.encode().decode() for letter in every] == every, "NVRTC wrote into a byte that Python shares"


def test_compile_kernels_error_quotes_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {name: kernels.source(name) for name in kernels.HEADERS}
    monkeypatch.setattr(kernels, "source", lambda name: texts[name].replace("COLDEST)", "COLDEST"))
    with pytest.raises(DeviceError, match=r"expected a \"\)\""):
        kernels.compile_kernels("sm_87")


def test_compile_kernels_unknown_architecture_is_named() -> None:
    with pytest.raises(DeviceError, match="sm_1"):
        kernels.compile_kernels("sm_1")
