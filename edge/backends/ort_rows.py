"""ONNX Runtime on the CPU, for blocks: keys and values in place, one request a pass.

Several requests in one pass would cost as much as a pass each (docs/log.md): they run in lanes, a thread each.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

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
DRAFT_INPUTS: Final = ("state", "token", "noise", "temperature")


@dataclass(frozen=True)
class _Bound:
    """Inputs and outputs of one shape, bound to memory that is written and read in one run after another."""

    binding: Any
    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]


@dataclass
class _Memory:
    """cache: keys and values of each layer (1, H, C, D/H), by input name. passes: by threads, rows and scored rows."""

    cache: dict[str, Floats]
    passes: dict[tuple[int, int, int], _Bound] = field(default_factory=dict)
    drafting: _Bound | None = None


class OrtRows:
    """The step, prefill and draft graphs of a bundle. A row scores the same for any number of threads, to the bit."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        model = manifest.model
        self.lanes = self._threads = threads or len(os.sched_getaffinity(0))
        self._alone = self._threads if model.d_model > NARROW else 1
        self.capacity = model.canvas_len + MAX_SEGMENTS  # a gap adds a copy of its left neighbour
        self._shape = (1, model.heads, self.capacity, model.d_model // model.heads)
        self._widths = {"scores": model.vocab_size, "states": model.d_model}
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
            expected = [(2, width) for width in self._widths.values()]
        elif role == "prefill":
            self.prefill(self.open_slot(), tokens, positions)
        else:
            state, noise = np.zeros(model.d_model, np.float32), np.zeros((self.depth, model.vocab_size), np.float32)
            law = Law(0, 1.0, manifest.top_k, 1.0, 0)
            made = [self.draft(self.open_slot(), state, token=model.vocab_size - 1, noise=noise, law=law).shape]
            expected = [(self.depth,)]
        if made != expected:
            raise BundleError(f"{file} gives arrays of shapes {made}, not {expected}")

    def open_slot(self) -> Slot:
        """See `edge.decoding.blocks.RowsBackend`."""
        arrays = {name: np.zeros(self._shape, np.float32) for name in self._cache}
        return Slot(np.zeros(self.capacity, np.int32), _Memory(arrays))

    def prefill(self, slot: Slot, tokens: Ids, positions: Ids) -> None:
        """See `edge.decoding.blocks.RowsBackend`."""
        session = self._open("prefill", 1)
        made = session.run(None, {"tokens": tokens[None], "positions": positions[None]})
        for name, rows in zip((output.name for output in session.get_outputs()), made, strict=True):
            slot.memory.cache[name.removeprefix("new_")][:, :, : tokens.size] = rows
        slot.positions[: tokens.size] = positions
        slot.cached = tokens.size

    def rows(self, slot: Slot, tokens: Ids, *, positions: Ids, scored: int, under_way: int = 1) -> RowScores:
        """See `edge.decoding.blocks.RowsBackend`."""
        size = self._alone if under_way == 1 else pool_size(self._threads, under_way)
        shape = size, tokens.size, scored
        session, bound = self._open("step", size), slot.memory.passes.get(shape)
        if bound is None:
            bound = self._bind_pass(session, slot, tokens.size, scored)
            if tokens.size <= self.depth + 1:  # those of prompts are seldom of one shape
                slot.memory.passes[shape] = bound
        given, rows = bound.inputs, bound.inputs["tokens"].size
        end = slot.cached + rows
        slot.positions[slot.cached : end] = positions
        given["tokens"][:], given["positions"][:], given["last"][:], given["total"][:] = tokens, positions, end - 1, end
        session.run_with_iobinding(bound.binding)
        return RowScores(**bound.outputs)

    def draft(self, slot: Slot, state: Floats, *, token: int, noise: Floats, law: Law) -> Ids:
        """See `edge.decoding.blocks.RowsBackend`."""
        session, bound = self._open("draft", 1), slot.memory.drafting
        if bound is None:
            given = {
                "state": np.empty((1, state.size), np.float32),
                "token": np.empty(1, np.int32),
                "temperature": np.empty((), np.float32),
            }
            bound = slot.memory.drafting = _bound(session, given, {"drafts": np.empty(self.depth, np.int32)})
        bound.inputs["state"][:], bound.inputs["token"][:] = state, token
        bound.inputs["temperature"][...] = 0 if law.top_k == 1 else law.temperature
        bound.binding.bind_cpu_input("noise", noise)
        session.run_with_iobinding(bound.binding)
        drafts: Ids = bound.outputs["drafts"]
        return drafts

    def _bind_pass(self, session: Any, slot: Slot, rows: int, scored: int) -> _Bound:
        """Keys and values are read and written where they lie."""
        # ONNX Runtime sums a lone row in another order: given twice, it is equal to the bit to any other.
        given: dict[str, NDArray[Any]] = {
            name: np.empty((1, max(2, rows)), np.int32) for name in ("tokens", "positions")
        }
        given |= {name: np.empty(1, np.int32) for name in ("last", "total")}
        given |= {"key_positions": slot.positions, "scored": np.arange(rows - scored, rows, dtype=np.int32)}
        made = {name: np.empty((scored, width), np.float32) for name, width in self._widths.items()}
        return _bound(session, given, made, slot.memory.cache)

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


def _bound(
    session: Any,
    given: dict[str, NDArray[Any]],
    made: dict[str, NDArray[Any]],
    in_place: Mapping[str, NDArray[Any]] = MappingProxyType({}),
) -> _Bound:
    """in_place: inputs NAME whose output new_NAME is the same memory."""
    import onnxruntime as ort  # loaded already, by the session

    binding, value = session.io_binding(), ort.OrtValue.ortvalue_from_numpy
    for name, array in (given | {**in_place}).items():
        binding.bind_ortvalue_input(name, value(array))
    for name, array in (made | {f"new_{name}": array for name, array in in_place.items()}).items():
        binding.bind_ortvalue_output(name, value(array))
    return _Bound(binding, given, made)
