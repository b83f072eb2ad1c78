"""Which shapes a TensorRT engine is built for: (batch, length), one optimization profile and one CUDA graph each."""

from typing import Final

from edge.backends.trt import kernels
from shared.errors import BundleError
from shared.manifest import Graph, Manifest

BATCHES: Final = (1, 2, 4, 8)
REQUESTS: Final = (1, 4, 8)
"""Slots that a pass of blocks computes."""
PAIRED: Final = (1, 2, 8, 16)
"""The same where requests may be guided: each has two slots, the second for its rows that read no memory."""
FULL: Final = 64
"""Positions that fill a multiprocessor: 512 on an Orin Nano, three times the ridge of its roofline.

Beyond that a larger batch is no faster per row, but costs build time for its tactics, a copy of the weights in its own
layout, and memory for activations and logits; and short requests would wait for it.
"""


def length_buckets(canvas_len: int) -> tuple[int, ...]:
    """The lengths an engine is built for."""
    return tuple(n for n in (canvas_len // 4, canvas_len // 2, canvas_len) if n >= 16 or n == canvas_len)


def batches_of(length: int, processors: int) -> tuple[int, ...]:
    """Batch sizes of that length that still gain throughput on a GPU of so many multiprocessors."""
    return tuple(batch for batch in BATCHES if batch == 1 or batch * length <= FULL * processors)


def buckets(manifest: Manifest, processors: int) -> list[tuple[int, int]]:
    """(batch, length) of each optimization profile, in the engine's order."""
    lengths = length_buckets(manifest.model.canvas_len)
    return [(batch, length) for length in lengths for batch in batches_of(length, processors)]


def reads_memory(step: Graph) -> bool:
    """Whether the rows of a step graph for CUDA read a memory of conditions."""
    return any(tensor.name == "reads" for tensor in step.inputs)


def step_profiles(canvas_len: int, window: int, paired: bool = False) -> list[tuple[int, int]]:
    """(requests, rows) of each optimization profile of the step graph, in the engine's order. paired: see `PAIRED`.

    A pass of blocks computes the first 1, 4 or 8 slots (paired: 1, 2, 8 or 16), whoever is in them, with a committed
    token and its drafts each; rows are so few that idle ones cost little. Prompts and evidence are read by one request
    at a time, in one pass.
    """
    reading = {canvas_len // 4, canvas_len}
    steps = [(requests, window + 1) for requests in (PAIRED if paired else REQUESTS)]
    return [*steps, *((1, rows) for rows in sorted(reading))]


def check_servable(manifest: Manifest) -> None:
    """Raise BundleError when the kernels cannot serve this bundle."""
    limits = (
        ("canvas_len", manifest.model.canvas_len, kernels.MAX_LENGTH),
        ("vocab_size", manifest.model.vocab_size, kernels.MAX_VOCAB),
        ("top_k", manifest.top_k, kernels.THREADS),
    )
    for name, value, most in limits:
        if value > most:
            raise BundleError(f"the TensorRT backend serves bundles with {name} up to {most}; this one has {value}")
