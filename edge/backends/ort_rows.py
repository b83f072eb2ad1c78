"""ONNX Runtime on the CPU, for blocks: keys and values in place, one request a pass.

Several requests in one pass would cost as much as a pass each (docs/log.md): they run in lanes, a thread each.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from edge.backends.ort import pool_size
from edge.backends.ort_session import open_session
from edge.decoding.blocks import Law, RowScores, Slot
from edge.decoding.types import Floats, Ids
from edge.system.locked import Locked
from shared.errors import BundleError, one_line
from shared.manifest import Manifest, Role, find_graph, has_role, verified_bytes
from shared.messages import MAX_SEGMENTS

ROLES: Final[tuple[Role, ...]] = ("step", "prefill", "draft")


@dataclass
class _Memory:
    """arrays: keys and values of each layer (1, H, C, D/H), by input name. bindings: of a session of each pool size."""

    arrays: dict[str, Floats]
    bindings: dict[int, Any]


class OrtRows:
    """The step, prefill and draft graphs of a bundle. A row scores the same for any number of threads, to the bit."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        model = manifest.model
        self.lanes = self._threads = threads or len(os.sched_getaffinity(0))
        self.capacity = model.canvas_len + MAX_SEGMENTS  # a gap adds a copy of its left neighbour
        self._shape = (1, model.heads, self.capacity, model.d_model // model.heads)
        self._layers = model.layers
        self._graphs: dict[str, tuple[Path, bytes]] = {}
        for role in ROLES:
            if has_role(manifest, "cpu", role):
                graph = find_graph(folder, manifest, "cpu", role)
                self._graphs[role] = folder / graph.file, verified_bytes(folder, graph.file, graph.sha256)
        self.depth = manifest.blocks.window if manifest.blocks is not None and "draft" in self._graphs else 0
        self._sessions: Locked[dict[tuple[str, int], Any]] = Locked({})  # by role and threads; they open when needed
        self._open("step", self._threads)

    def open_slot(self) -> Slot:
        """See `edge.decoding.blocks.RowsBackend`."""
        names = [f"{kind}.{layer}" for layer in range(self._layers) for kind in ("keys", "values")]
        arrays = {name: np.zeros(self._shape, np.float32) for name in names}
        return Slot(np.zeros(self.capacity, np.int32), _Memory(arrays, {}))

    def prefill(self, slot: Slot, tokens: Ids, positions: Ids) -> None:
        """See `edge.decoding.blocks.RowsBackend`."""
        session = self._open("prefill", 1)
        made = session.run(None, {"tokens": tokens[None], "positions": positions[None]})
        for name, rows in zip((output.name for output in session.get_outputs()), made, strict=True):
            slot.memory.arrays[name.removeprefix("new_")][:, :, : tokens.size] = rows
        slot.positions[: tokens.size] = positions
        slot.cached = tokens.size

    def rows(self, slot: Slot, tokens: Ids, *, positions: Ids, scored: int, under_way: int = 1) -> RowScores:
        """See `edge.decoding.blocks.RowsBackend`."""
        size = pool_size(self._threads, under_way)
        session = self._open("step", size)
        last = tokens.size
        if last == 1:  # ONNX Runtime sums a lone row in another order: given twice, it is equal to the bit to any other
            tokens, positions = tokens.repeat(2), positions.repeat(2)
        end = slot.cached + tokens.size
        slot.positions[slot.cached : end] = positions
        small = {
            "tokens": tokens[None],
            "positions": positions[None],
            "key_positions": slot.positions[:end],
            "last": np.array([end - 1], np.int32),
            "total": np.array(end, np.int32),
            "scored": np.arange(last - scored, last, dtype=np.int32),
        }
        binding = self._binding(slot, session, size)
        for name, value in small.items():
            binding.bind_cpu_input(name, value)
        for name in RowScores._fields:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        return RowScores(*(value.numpy() for value in binding.get_outputs()[-len(RowScores._fields) :]))

    def draft(self, state: Floats, token: int, noise: Floats, law: Law) -> Ids:
        """See `edge.decoding.blocks.RowsBackend`."""
        greedy = law.temperature == 0
        feed = {
            "state": state[None],
            "token": np.array([token], np.int32),
            "noise": noise,
            "inverse_temperature": np.array(1.0 if greedy else 1 / max(law.temperature, 1e-30), np.float32),
            "top_k": np.array([1 if greedy else law.top_k], np.int64),
        }
        drafts: Ids = self._open("draft", 1).run(None, feed)[0]
        return drafts

    def _binding(self, slot: Slot, session: Any, size: int) -> Any:
        """The session's reading and writing of a slot's keys and values where they lie."""
        bindings: dict[int, Any] = slot.memory.bindings
        if size not in bindings:
            import onnxruntime as ort  # loaded already, by the session

            bindings[size] = session.io_binding()
            for name, array in slot.memory.arrays.items():
                value = ort.OrtValue.ortvalue_from_numpy(array)  # the same memory
                bindings[size].bind_ortvalue_input(name, value)
                bindings[size].bind_ortvalue_output(f"new_{name}", value)
        return bindings[size]

    def _open(self, role: str, threads: int) -> Any:
        with self._sessions as sessions:
            if (role, threads) not in sessions:
                file, graph = self._graphs[role]
                try:
                    sessions[role, threads] = open_session(graph, threads)
                except Exception as error:  # onnxruntime raises types of its own that share no public base
                    raise BundleError(f"{file} cannot be loaded by ONNX Runtime: {one_line(str(error))}") from None
            return sessions[role, threads]

    def close(self) -> None:
        """Drop the sessions and their memory."""
        with self._sessions as sessions:
            sessions.clear()
