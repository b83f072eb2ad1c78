"""How many drafts a pass should have on this device: as many as give the most tokens per second.

The cost of a pass is measured when a bundle is loaded, in a few milliseconds; how many tokens it keeps is in the
manifest. The text is the same with any number.
"""

import logging
from time import thread_time
from typing import Final

import numpy as np

from edge.decoding.blocks import Law, RowsBackend, draw
from shared.manifest import Manifest
from shared.tokens import FIRST_TEXT_ID

log = logging.getLogger(__name__)

BUDGET_S: Final = 0.04
"""CPU time; no round begins after it. One warms up, and at least one is measured."""
ROUNDS: Final = 8
MARGIN: Final = 1.1
"""Fewer drafts than the bundle makes must be this much faster: neighbours disturb what is measured."""
GIVEN: Final = 0.25
"""Share of the canvas that is filled before the measured passes, as in the middle of a story."""


def best_window(rows: RowsBackend, manifest: Manifest) -> int:
    """The window of requests that name none; the manifest's where it does not say what drafts keep."""
    assert manifest.blocks is not None
    most = min(manifest.blocks.window, rows.depth)
    kept = tokens_per_pass(manifest, most)
    if most == 0 or kept is None:
        return manifest.blocks.window
    costs = pass_seconds(rows, manifest, most)
    speeds = np.array(kept) / costs
    window = int(speeds.argmax()) if speeds.max() > MARGIN * speeds[most] else most
    times = ", ".join(f"{cost * 1e3:.2f}" for cost in costs)
    log.info("a pass with 0 to %d drafts takes %s ms here: %d pay most", most, times, window)
    return window


def tokens_per_pass(manifest: Manifest, most: int) -> list[float] | None:
    """By the number of drafts, 0 to `most`, at the temperature nearest the bundle's own.

    The manifest has the figure of all drafts, E = 1 + a + a² + … + a^most: a, which each draft is kept with, is solved
    for. None where it has no figure.
    """
    assert manifest.blocks is not None
    found = next((law.tokens_per_pass for law in manifest.laws if law.tokens_per_pass), None)
    if not found:
        return None
    usual = manifest.blocks.temperature
    wanted = found[min(found, key=lambda temperature: abs(float(temperature) - usual))]
    low, high = 0.0, 1.0
    for _ in range(40):
        a = (low + high) / 2
        low, high = (a, high) if sum(a**k for k in range(most + 1)) < wanted else (low, a)
    return [sum(low**k for k in range(window + 1)) for window in range(most + 1)]


def pass_seconds(rows: RowsBackend, manifest: Manifest, most: int) -> list[float]:
    """The least time of a pass with 0 to `most` drafts, interleaved; drawing and the next drafts included.

    Not the noise: it costs a token the same in any pass. CPU time of this thread, which other processes disturb less.
    """
    model, law = manifest.model, Law(0, 1.0, manifest.top_k, 1.0, most)
    slot, least = rows.open_slot(), [np.inf] * (most + 1)
    slot.cached = int(GIVEN * model.canvas_len)
    slot.positions[: slot.cached] = np.arange(slot.cached)
    noise = np.zeros((max(most + 1, rows.depth), model.vocab_size), np.float32)
    begun_s = thread_time()
    for number in range(ROUNDS):
        for window in range(most + 1):
            places = np.arange(slot.cached, slot.cached + window + 1, dtype=np.int32)
            started_s = thread_time()
            scores, states = rows.rows(slot, places + FIRST_TEXT_ID, positions=places, scored=window + 1)
            tokens = draw(scores, noise[: window + 1], law)
            if window:
                rows.draft(slot, states[0], token=int(tokens[0]), noise=noise[: rows.depth], law=law)
            if number:  # the first warms up
                least[window] = min(least[window], thread_time() - started_s)
        if number and thread_time() - begun_s > BUDGET_S:
            break
    return least
