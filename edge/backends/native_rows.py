"""The compiled library on the CPU, for blocks: one call a pass, whose rows may be of several requests.

It runs the INT8 graphs that ONNX Runtime runs for `OrtRows`, which prefills, and runs requests with conditions.
"""

import logging
import threading
from collections.abc import Sequence
from ctypes import addressof
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge.backends.ort_rows import OrtRows
from edge.decoding.blocks import NOT_NUMBERS, Law, Rows, RowScores, Slot, Writing, draw_rows, finish, keep, next_rows
from edge.decoding.canvas import COLDEST
from edge.decoding.types import Floats, Ids
from edge.native import Drafter, Library, Network, Request, library
from edge.native.initializers import initializers
from edge.native.network import NotKnownError, read_drafter, read_network
from shared.manifest import Manifest, Role, find_graph, has_role, verified_bytes
from shared.messages import MAX_SEGMENTS

log = logging.getLogger(__name__)

TOGETHER: Final = 4
"""Requests of a pass at most. Eight on two cores are four in each lane."""
PADDING: Final = 32  # floats that a pass needs beside a slot's room
ALIGNMENT: Final = 64
FILTERING, NOT_FINITE = 1, 2  # `Left` in `types.h`


@dataclass(frozen=True)
class Networks:
    """What the library reads. alive: the arrays that the structures point to."""

    library: Library
    network: Network
    drafter: Drafter | None
    alive: Sequence[Any]


def read_networks(folder: Path, manifest: Manifest) -> Networks | None:
    """The bundle's networks; None where the library is not built or cannot run them. Raises BundleError."""
    found = library()
    if found is None:
        return None

    def constants(role: Role) -> dict[str, NDArray[Any]]:
        graph = find_graph(folder, manifest, "cpu", role)
        if graph.precision != "int8":
            raise NotKnownError(f"it is {graph.precision}")
        return initializers(verified_bytes(folder, graph.file, graph.sha256))

    role, drafter = "step", None
    try:
        network, alive = read_network(constants("step"), manifest.model)
        if manifest.blocks is not None and manifest.blocks.window and has_role(manifest, "cpu", "draft"):
            role = "draft"
            drafter, more = read_drafter(constants("draft"), manifest.model, manifest.blocks.window)
            alive += more
    except (NotKnownError, ValueError) as error:
        log.info("ONNX Runtime runs the bundle's blocks: the compiled library does not know its %s: %s", role, error)
        return None
    return Networks(found, network, drafter, alive)


class _Memory:
    """A slot's caches and its part of a pass, at addresses that stay.

    cache, passes, drafting: as in ONNX Runtime's slots. noise: of the positions around the last one.
    """

    def __init__(self, cache: dict[str, Floats], positions: Ids, depth: int, widths: Sequence[int]) -> None:
        self.cache = cache
        self.passes: dict[Any, Any] = {}
        self.drafting: Any = None
        self.tokens, self.positions = np.empty((2, positions.size), np.int32)
        self.caches = np.array([array.ctypes.data for array in cache.values()], np.uintp)
        self.scores, self.states = (np.empty((depth + 1, width), np.float32) for width in widths)
        self.noise = np.empty((2 * (depth + 1), widths[0]), np.float32)
        self.noise_of = np.empty(len(self.noise), np.int32)
        self.drawn, self.drafts = np.empty((2, depth + 1), np.int32)
        self.request = Request(noise_rows=len(self.noise), room=positions.size, places=positions.ctypes.data)
        for name in ("tokens", "positions", "caches", "scores", "states", "noise", "noise_of", "drawn", "drafts"):
            setattr(self.request, name, getattr(self, name).ctypes.data)
        self.seed: int | None = None

    def place(self, rows: Rows) -> Request:
        """The slot's next rows. Where more are scored than with drafts, its arrays are larger from then on.

        IndexError for rows without a place in the slot or the network: the library would write where they point.
        """
        request, count, room = self.request, rows.tokens.size, self.positions.size
        ids, places = rows.tokens.tolist(), rows.positions.tolist()  # few: numpy takes thrice as long to look at them
        if not (0 < rows.scored <= count and rows.slot.cached + count <= room and len(places) == count):
            raise IndexError(f"{count} rows, {rows.scored} of them scored, behind {rows.slot.cached} of {room}")
        if min(ids) < 0 or max(ids) >= self.noise.shape[1] or min(places) < 0 or max(places) >= room - MAX_SEGMENTS:
            raise IndexError("tokens or positions that the network does not have")
        if rows.scored > len(self.scores):
            self.scores, self.states = (
                np.empty((rows.scored, array.shape[1]), np.float32) for array in (self.scores, self.states)
            )
            request.scores, request.states = self.scores.ctypes.data, self.states.ctypes.data
        self.tokens[:count], self.positions[:count] = rows.tokens, rows.positions
        request.rows, request.kept, request.scored = count, rows.slot.cached, rows.scored
        return request

    def place_next(self, w: Writing) -> Request:
        """The rows of a request's next pass, and how they are drawn from."""
        request, law = self.place(next_rows(w)), w.law
        if law.seed != self.seed:
            self.seed = request.seed = law.seed
            self.noise_of.fill(-1)
        request.temperature = 0 if law.temperature == 0 else max(law.temperature, COLDEST)
        request.draft_temperature = 0 if law.top_k == 1 else law.temperature
        request.top_rank = law.top_k if law.top_p == 1 else 1
        request.window, request.last = law.window, w.gaps[0][1]
        return request


class NativeRows(OrtRows):
    """Rows by the library. A row scores the same whatever other rows there are, to the bit."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int, networks: Networks) -> None:
        self.batches = tuple(range(1, TOGETHER + 1))
        self.networks = networks
        self._library, drafter = networks.library, networks.drafter
        self._network = addressof(networks.network)
        self._drafter = None if drafter is None else addressof(drafter)
        self._local = threading.local()
        super().__init__(folder, manifest, threads)

    def _check(self, role: Role) -> None:
        """See `OrtRows`. The library's networks were checked when they were read."""
        if role == "prefill":
            super()._check(role)

    def open_slot(self) -> Slot:
        """See `edge.decoding.blocks.RowsBackend`."""
        positions = np.zeros(self.capacity, np.int32)
        return Slot(positions, _Memory(self._caches(), positions, self.depth, list(self._widths.values())))

    def advance(self, writings: Sequence[Writing]) -> None:
        """See `edge.decoding.together.SharedRows`.

        A draw that top-k or top-p may not keep is drawn by `edge.decoding.blocks`, and so are those behind it.
        """
        slots = [w.slot for w in writings if w.slot is not None]
        for w, slot in zip(writings, slots, strict=True):
            if w.evidence is not None:
                self.prefill(slot, *w.evidence)
                w.evidence = None
        requests = (Request * len(slots))(*(s.memory.place_next(w) for w, s in zip(writings, slots, strict=True)))
        space = self._space(sum(request.rows for request in requests))
        self._library.advance(self._network, self._drafter, addressof(requests), len(slots), space)
        if any(request.left == NOT_FINITE for request in requests):
            raise RuntimeError(NOT_NUMBERS)
        drawn = [  # of all, before any is committed: it raises where a score is not a number
            draw_rows(w, s.memory.scores[: r.scored])
            if r.left == FILTERING
            else s.memory.drawn[: r.agreed + 1].tolist()
            for w, s, r in zip(writings, slots, requests, strict=True)
        ]
        for w, slot, request, new in zip(writings, slots, requests, drawn, strict=True):
            if request.left == FILTERING:
                finish(self, w, slot.memory.states, new)
            elif keep(w, new)[1]:
                w.drafts = slot.memory.drafts[: request.drafted].tolist()

    def rows(self, slot: Slot, tokens: Ids, *, positions: Ids, scored: int, under_way: int = 1) -> RowScores:
        """See `edge.decoding.blocks.RowsBackend`."""
        if slot.condition is not None:
            return super().rows(slot, tokens, positions=positions, scored=scored, under_way=under_way)
        memory = slot.memory
        request = memory.place(Rows(slot, tokens, positions, scored))
        self._library.run(self._network, addressof(request), 1, self._space(tokens.size))
        return RowScores(memory.scores[:scored], memory.states[:scored])

    def draft(self, slot: Slot, state: Floats, *, token: int, noise: Floats, law: Law) -> Ids:
        """See `edge.decoding.blocks.RowsBackend`."""
        memory, state = slot.memory, np.ascontiguousarray(state)
        self._library.draft(
            self._drafter,
            state.ctypes.data,
            token,
            noise.ctypes.data,
            noise.shape[1],
            0 if law.top_k == 1 else law.temperature,
            memory.drafts.ctypes.data,
            self._space(1),
        )
        made: Ids = memory.drafts[: self.depth]
        return made

    def _space(self, rows: int) -> int:
        """The address of this thread's memory, enough for a pass of so many rows, and for drafts."""
        held, address, _ = getattr(self._local, "memory", (0, 0, None))
        if held < rows:
            needed = self._library.space(rows, self._widths["states"], *self._widest())
            memory = np.empty(needed + ALIGNMENT, np.uint8)
            address = memory.ctypes.data + -memory.ctypes.data % ALIGNMENT
            self._local.memory = rows, address, memory
        return address

    def _widest(self) -> tuple[int, int]:
        """See `edgelm_space`."""
        wide, weights = 4 * self._widths["states"], self.capacity + PADDING
        drafter = self.networks.drafter
        return (wide, weights) if drafter is None else (max(wide, drafter.hidden), max(weights, drafter.head.outputs))
