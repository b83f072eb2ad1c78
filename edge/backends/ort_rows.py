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
from shared.tokens import BOS

ROLES: Final[tuple[Role, ...]] = ("step", "prefill", "draft")
STEP_INPUTS: Final = ("tokens", "positions", "key_positions", "last", "total", "scored")
NARROW: Final = 256
"""Up to this width a request by itself has one thread, too: its rows are done before a second one has woken up."""
DRAFT_INPUTS: Final = ("state", "token", "noise", "inverse_temperature", "top_k")


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
        self._alone = self._threads if model.d_model > NARROW else 1
        self.capacity = model.canvas_len + MAX_SEGMENTS  # a gap adds a copy of its left neighbour
        self._shape = (1, model.heads, self.capacity, model.d_model // model.heads)
        self._cache = [f"{kind}.{layer}" for layer in range(model.layers) for kind in ("keys", "values")]
        self._graphs: dict[Role, tuple[Path, bytes]] = {}
        for role in ROLES:
            if role == "step" or has_role(manifest, "cpu", role):
                graph = find_graph(folder, manifest, "cpu", role)
                self._graphs[role] = folder / graph.file, verified_bytes(folder, graph.file, graph.sha256)
        self.depth = manifest.blocks.window if manifest.blocks is not None and "draft" in self._graphs else 0
        self.fills_gaps = "prefill" in self._graphs
        self._sessions: Locked[dict[tuple[Role, int], Any]] = Locked({})  # by role and threads; more open when needed
        for role, (file, _) in self._graphs.items():
            try:
                self._check(role, manifest)
            except BundleError:
                raise
            except Exception as error:  # onnxruntime raises types of its own that share no public base
                raise BundleError(f"{file} does not run: {one_line(str(error))}") from None

    def _check(self, role: Role, manifest: Manifest) -> None:
        """Check what a graph reads and makes, and run it, with the last token and position. Raises BundleError."""
        model, file = manifest.model, self._graphs[role][0]
        session = self._open(role, self._alone if role == "step" else 1)
        cache = set(self._cache)
        new = {f"new_{name}" for name in cache}
        needed = {
            "step": ({*STEP_INPUTS, *cache}, {*RowScores._fields, *new}),
            "prefill": ({*STEP_INPUTS[:2]}, new),
            "draft": ({*DRAFT_INPUTS}, {"drafts"}),
        }[role]
        found = tuple({value.name for value in values} for values in (session.get_inputs(), session.get_outputs()))
        if found != needed:
            shown, wanted = ("; ".join(", ".join(sorted(names)) for names in sides) for sides in (found, needed))
            raise BundleError(f"{file} has inputs and outputs {shown}, not {wanted}")
        tokens, positions = np.array([[BOS, model.vocab_size - 1], [0, model.canvas_len - 1]], np.int32)
        made: list[tuple[int, ...]] = []
        expected = made
        if role == "step":
            made = [array.shape for array in self.rows(self.open_slot(), tokens, positions=positions, scored=2)]
            expected = [(2, manifest.top_k), (2, manifest.top_k), (2, model.d_model)]
        elif role == "prefill":
            self.prefill(self.open_slot(), tokens, positions)
        else:
            state, noise = np.zeros(model.d_model, np.float32), np.zeros((self.depth, model.vocab_size), np.float32)
            made = [self.draft(state, model.vocab_size - 1, noise, Law(0, 1.0, manifest.top_k, 1.0, 0)).shape]
            expected = [(self.depth,)]
        if made != expected:
            raise BundleError(f"{file} gives arrays of shapes {made}, not {expected}")

    def open_slot(self) -> Slot:
        """See `edge.decoding.blocks.RowsBackend`."""
        arrays = {name: np.zeros(self._shape, np.float32) for name in self._cache}
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
        size = self._alone if under_way == 1 else pool_size(self._threads, under_way)
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

    def _open(self, role: Role, threads: int) -> Any:
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
