"""The compiled library on the CPU, for blocks: one call a pass, whose rows may be of several requests.

It runs the INT8 graphs that ONNX Runtime runs for `OrtRows`, which encodes conditions and prefills what is around gaps.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from ctypes import addressof
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge.backends.ort_conditions import Remembered
from edge.backends.ort_rows import OrtRows
from edge.decoding import blocks
from edge.decoding.blocks import (
    NOT_NUMBERS,
    Law,
    Rows,
    RowScores,
    Slot,
    Writing,
    begin,
    draft_again,
    draw_rows,
    keep,
    narrow,
    next_rows,
)
from edge.decoding.canvas import COLDEST
from edge.decoding.conditions import Condition, Remaining
from edge.decoding.types import Floats, Ids
from edge.native import Drafter, Library, Network, Request, library
from edge.native.initializers import initializers
from edge.native.network import NotKnownError, read_conditioned, read_drafter, read_network
from edge.native.readings import Readings
from edge.system.locked import Locked
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
    role, drafter = "step", None
    try:
        network, alive = read_network(_constants(folder, manifest, "step"), manifest.model)
        if manifest.blocks is not None and manifest.blocks.window and has_role(manifest, "cpu", "draft"):
            role = "draft"
            drafter, more = read_drafter(_constants(folder, manifest, "draft"), manifest.model, manifest.blocks.window)
            alive += more
    except NotKnownError as error:
        log.info("ONNX Runtime runs the bundle's blocks: the compiled library does not know its %s: %s", role, error)
        return None
    return Networks(found, network, drafter, alive)


def _constants(folder: Path, manifest: Manifest, role: Role) -> dict[str, NDArray[Any]]:
    """Of an INT8 graph. Raises NotKnownError, BundleError."""
    graph = find_graph(folder, manifest, "cpu", role)
    if graph.precision != "int8":
        raise NotKnownError(f"it is {graph.precision}")
    try:
        return initializers(verified_bytes(folder, graph.file, graph.sha256))
    except ValueError as error:
        raise NotKnownError(str(error)) from None


class _Conditioned:
    """How a slot's rows read a condition. network: its address. plain: whether there are rows that do not read it."""

    def __init__(self, network: int, remembered: Remembered, manifest: Manifest) -> None:
        self.network, self.readings = network, _readings(remembered, manifest)
        self._guidance, self._best = float(remembered.guidance), manifest.top_k
        self._plain = _addresses(remembered.plain)
        self._made: list[Floats] = []

    def place(self, request: Request, widths: Sequence[int]) -> list[Request]:
        """The request as it reads the condition, and behind it, with guidance, as it does not."""
        request.readings, request.best = self.readings.address, self._best
        request.guidance, request.guided = self._guidance, int(self._plain.size > 0)
        if not request.guided:
            return [request]
        other = Request.from_buffer_copy(request)
        self._made = [np.empty((request.scored, width), np.float32) for width in widths]
        other.readings, other.guided, other.caches = None, 0, self._plain.ctypes.data
        other.scores, other.states = (array.ctypes.data for array in self._made)
        return [request, other]


def _readings(remembered: Remembered, manifest: Manifest) -> Readings:
    """NotKnownError for what the library cannot read."""
    model = manifest.model
    return Readings(remembered.memory, layers=model.layers, heads=model.heads, width=model.d_model)


def _addresses(arrays: Mapping[str, Floats]) -> NDArray[np.uintp]:
    return np.array([array.ctypes.data for array in arrays.values()], np.uintp)


class _Memory:
    """A slot's caches and its part of a pass, at addresses that stay.

    cache, passes, drafting: as in ONNX Runtime's slots. noise: of the positions around the last one.
    """

    def __init__(self, cache: dict[str, Floats], positions: Ids, depth: int, widths: Sequence[int]) -> None:
        self.cache, self._widths = cache, widths
        self.passes: dict[Any, Any] = {}
        self.drafting: Any = None
        self.tokens, self.positions = np.empty((2, positions.size), np.int32)
        self.caches = _addresses(cache)
        self.conditioned: _Conditioned | None = None
        self.scores, self.states = (np.empty((depth + 1, width), np.float32) for width in widths)
        self.noise = np.empty((2 * (depth + 1), widths[0]), np.float32)
        self.noise_of = np.empty(len(self.noise), np.int32)
        self.drawn, self.drafts = np.empty((2, depth + 1), np.int32)
        self.request = Request(noise_rows=len(self.noise), room=positions.size, places=positions.ctypes.data)
        for name in ("tokens", "positions", "caches", "scores", "states", "noise", "noise_of", "drawn", "drafts"):
            setattr(self.request, name, getattr(self, name).ctypes.data)
        self.seed: int | None = None

    def conditioned_of(self, slot: Slot) -> _Conditioned | None:
        """None where its rows read no condition."""
        return None if slot.condition is None else self.conditioned

    def place(self, rows: Rows) -> list[Request]:
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
        request.readings, request.guided = None, 0
        conditioned = self.conditioned_of(rows.slot)
        return [request] if conditioned is None else conditioned.place(request, self._widths)

    def place_next(self, w: Writing) -> list[Request]:
        """The rows of a request's next pass, and how they are drawn from."""
        request, law = self.request, w.law
        if law.seed != self.seed:
            self.seed = request.seed = law.seed
            self.noise_of.fill(-1)
        request.temperature = 0 if law.temperature == 0 else max(law.temperature, COLDEST)
        request.draft_temperature = 0 if law.top_k == 1 else law.temperature
        request.top_rank = law.top_k if law.top_p == 1 else 1
        request.window, request.last = law.window, w.gaps[0][1]
        return self.place(next_rows(w))


class NativeRows(OrtRows):
    """Rows by the library. A row scores the same whatever other rows there are, to the bit."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int, networks: Networks) -> None:
        self.batches = tuple(range(1, TOGETHER + 1))
        self.networks = networks
        self._library, drafter = networks.library, networks.drafter
        self._network = addressof(networks.network)
        self._drafter = None if drafter is None else addressof(drafter)
        self._conditioned: Locked[dict[Role, tuple[Network, list[Any]]]] = Locked({})
        self._local = threading.local()
        self._folder = folder
        super().__init__(folder, manifest, threads)

    def _check(self, role: Role) -> None:
        """See `OrtRows`. The library's networks were checked when they were read."""
        if role == "prefill":
            super()._check(role)

    def _check_conditioned(self, role: Role, condition: Condition) -> None:
        """See `OrtRows`, which runs what the library does not know."""
        if role.startswith("step."):
            folder, manifest = self._folder, self._manifest
            try:
                constants, plain = (_constants(folder, manifest, one) for one in (role, "step"))
                best = manifest.top_k if role == "step.guided" else None
                read = read_conditioned(constants, plain, self.networks.network, best=best)
                assert self.conditions is not None
                _readings(self.conditions.remember(condition, {}), manifest)
            except NotKnownError as error:
                log.info("ONNX Runtime runs %s: the compiled library does not know it: %s", role, error)
            else:
                with self._conditioned as known:
                    known[role] = read
                return
        super()._check_conditioned(role, condition)

    def open_slot(self) -> Slot:
        """See `edge.decoding.blocks.RowsBackend`."""
        positions = np.zeros(self.capacity, np.int32)
        return Slot(positions, _Memory(self._caches(), positions, self.depth, list(self._widths.values())))

    def encode(self, slot: Slot, condition: Condition) -> None:
        """See `edge.decoding.blocks.ConditionedRows`."""
        super().encode(slot, condition)
        remembered: Remembered = slot.condition
        slot.memory.conditioned = None
        with self._conditioned as known:
            network, _ = known.get(remembered.role, (None, []))
        if network is not None:
            slot.memory.conditioned = _Conditioned(addressof(network), remembered, self._manifest)

    def narrow(self, slot: Slot, remaining: Remaining) -> None:
        """See `edge.decoding.blocks.ConditionedRows`."""
        super().narrow(slot, remaining)
        if (conditioned := slot.memory.conditioned_of(slot)) is not None:
            conditioned.readings.hide()

    def advance(self, writings: Sequence[Writing], under_way: int = 1) -> None:
        """See `edge.decoding.together.SharedRows`.

        A draw that top-k or top-p may not keep is drawn by `edge.decoding.blocks`, and so are those behind it.
        """
        slots = [w.slot for w in writings if w.slot is not None]
        for w in writings:
            begin(self, w)
        if any(slot.condition is not None and slot.memory.conditioned is None for slot in slots):
            (w,) = writings
            blocks.advance(self, w, under_way)
            return
        placed = [request for w, slot in zip(writings, slots, strict=True) for request in slot.memory.place_next(w)]
        requests = (Request * len(placed))(*placed)
        self._call(self._library.advance, slots[0], requests, self._drafter)
        own = [request for i, request in enumerate(requests) if not i or not requests[i - 1].guided]
        if any(request.left == NOT_FINITE for request in own):
            raise RuntimeError(NOT_NUMBERS)
        drawn = [  # of all, before any is committed: it raises where a score is not a number
            draw_rows(w, s.memory.scores[: r.scored])
            if r.left == FILTERING
            else s.memory.drawn[: r.agreed + 1].tolist()
            for w, s, r in zip(writings, slots, own, strict=True)
        ]
        for w, slot, request, new in zip(writings, slots, own, drawn, strict=True):
            agreed, is_open, told = keep(w, new)
            if told:
                narrow(self, w)
            if is_open and (told or request.left == FILTERING):
                draft_again(self, w, slot.memory.states[agreed])
            elif is_open:
                w.drafts = slot.memory.drafts[: request.drafted].tolist()

    def rows(self, slot: Slot, tokens: Ids, *, positions: Ids, scored: int, under_way: int = 1) -> RowScores:
        """See `edge.decoding.blocks.RowsBackend`."""
        memory = slot.memory
        if slot.condition is not None and memory.conditioned is None:
            return super().rows(slot, tokens, positions=positions, scored=scored, under_way=under_way)
        placed = memory.place(Rows(slot, tokens, positions, scored))
        self._call(self._library.run, slot, (Request * len(placed))(*placed))
        return RowScores(memory.scores[:scored], memory.states[:scored])

    def _call(self, function: Any, slot: Slot, requests: Any, *drafter: int | None) -> None:
        """Run requests that are conditioned as this slot is. A pass of several is of none with a condition."""
        conditioned: _Conditioned | None = slot.memory.conditioned_of(slot)
        network, weights = self._network, self._widest[1]
        if conditioned is not None:
            network, weights = conditioned.network, max(weights, conditioned.readings.most)
        space = self._space(sum(request.rows for request in requests), weights)
        function(network, *drafter, addressof(requests), len(requests), weights, space)

    def draft(self, slot: Slot, state: Floats, *, token: int, noise: Floats, law: Law) -> Ids:
        """See `edge.decoding.blocks.RowsBackend`."""
        if self._drafter is None:
            return super().draft(slot, state, token=token, noise=noise, law=law)
        memory, state = slot.memory, np.ascontiguousarray(state)
        self._library.draft(
            self._drafter,
            state.ctypes.data,
            token,
            noise.ctypes.data,
            noise.shape[1],
            0 if law.top_k == 1 else law.temperature,
            memory.drafts.ctypes.data,
            self._space(1, self._widest[1]),
        )
        made: Ids = memory.drafts[: self.depth]
        return made

    def _space(self, rows: int, weights: int) -> int:
        """The address of this thread's memory, enough for a pass of so many rows and weights, and for drafts."""
        held, wide, address, _ = getattr(self._local, "memory", (0, 0, 0, None))
        if held < rows or wide < weights:
            held, wide = max(held, rows), max(wide, weights)
            needed = self._library.space(held, self._widths["states"], self._widest[0], wide)
            memory = np.empty(needed + ALIGNMENT, np.uint8)
            address = memory.ctypes.data + -memory.ctypes.data % ALIGNMENT
            self._local.memory = held, wide, address, memory
        return address

    @cached_property
    def _widest(self) -> tuple[int, int]:
        """See `edgelm_space`. Guidance needs room for a row's scores."""
        drafter, width, scores = self.networks.drafter, self._widths["states"], self._widths["scores"]
        return max(4 * width, 0 if drafter is None else drafter.hidden), max(self.capacity + PADDING, scores)
