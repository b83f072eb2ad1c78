"""ONNX Runtime on the CPU, for blocks: keys and values in place.

Requests run in lanes, a thread each.
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
from edge.backends.ort_conditions import PLAIN, OrtConditions, Remembered
from edge.backends.ort_session import Graphs, check_names
from edge.decoding.blocks import Law, RowScores, Slot
from edge.decoding.conditions import Condition, Remaining
from edge.decoding.types import Floats, Ids
from shared.errors import BundleError, one_line
from shared.manifest import Manifest, Role
from shared.messages import MAX_SEGMENTS
from shared.tokens import BOS

ROLES: Final[tuple[Role, ...]] = ("step", "prefill", "draft")
STEP_INPUTS: Final = ("tokens", "positions", "key_positions", "last", "total", "scored")
NARROW: Final = 256
"""Up to this width a lone request has one thread, too: its rows are done before a second thread wakes up."""
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
    """The step, prefill and draft graphs of a bundle. A row scores the same for any number of threads, to the bit.

    conditions: the graphs for requests with words or pictures; None in a bundle without them.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int) -> None:
        model = manifest.model
        self.lanes = self._threads = threads or len(os.sched_getaffinity(0))
        self._alone = self._threads if model.d_model > NARROW else 1
        self.capacity = model.canvas_len + MAX_SEGMENTS  # a gap adds a copy of its left neighbour
        self._manifest = manifest
        self._shape = (1, model.heads, self.capacity, model.d_model // model.heads)
        self._widths = {"scores": model.vocab_size, "states": model.d_model}
        self._cache = [f"{kind}.{layer}" for layer in range(model.layers) for kind in ("keys", "values")]
        self._graphs = Graphs(folder, manifest)
        roles = [role for role in ROLES if role == "step" or self._graphs.has(role)]
        self.depth = manifest.blocks.window if manifest.blocks is not None and "draft" in roles else 0
        self.fills_gaps = "prefill" in roles
        self.conditions = None if manifest.conditions is None else OrtConditions(folder, manifest)
        for role in roles:
            file = self._graphs.file(role)
            try:
                self._check(role)
            except BundleError:
                raise
            except Exception as error:  # onnxruntime raises types of its own that share no public base
                raise BundleError(f"{file} does not run: {one_line(str(error))}") from None

    def _check(self, role: Role) -> None:
        """Check what a graph reads and makes, and run it, with the last token and position. Raises BundleError."""
        model, file, cache = self._manifest.model, self._graphs.file(role), set(self._cache)
        new = {f"new_{name}" for name in cache}
        needed = {
            "step": ({*STEP_INPUTS, *cache}, {*RowScores._fields, *new}),
            "prefill": ({*STEP_INPUTS[:2]}, new),
            "draft": ({*DRAFT_INPUTS}, {"drafts"}),
        }[role]
        check_names(file, self._graphs.open(role, self._alone if role == "step" else 1), needed)
        if role != "draft":
            self._try_rows(role, self.open_slot(), file)
            return
        state, noise = np.zeros(model.d_model, np.float32), np.zeros((self.depth, model.vocab_size), np.float32)
        law = Law(0, 1.0, self._manifest.top_k, 1.0, 0)
        made = self.draft(self.open_slot(), state, token=model.vocab_size - 1, noise=noise, law=law).shape
        if made != (self.depth,):
            raise BundleError(f"{file} gives arrays of shapes {[made]}, not {[(self.depth,)]}")

    def _try_rows(self, role: Role, slot: Slot, file: Path) -> None:
        """Run a graph of rows. Raises BundleError when its shapes are not the manifest's."""
        model = self._manifest.model
        tokens, positions = np.array([[BOS, model.vocab_size - 1], [0, model.canvas_len - 1]], np.int32)
        if role.startswith("prefill"):
            self.prefill(slot, tokens, positions)
            return
        made = [array.shape for array in self.rows(slot, tokens, positions=positions, scored=2)]
        expected = [(2, width) for width in self._widths.values()]
        if made != expected:
            raise BundleError(f"{file} gives arrays of shapes {made}, not {expected}")

    def open_slot(self) -> Slot:
        """See `edge.decoding.blocks.RowsBackend`."""
        return Slot(np.zeros(self.capacity, np.int32), _Memory(self._caches()))

    def _caches(self, prefix: str = "") -> dict[str, Floats]:
        return {f"{prefix}{name}": np.zeros(self._shape, np.float32) for name in self._cache}

    @property
    def fills_conditioned_gaps(self) -> bool:
        """See `edge.decoding.blocks.ConditionedRows`."""
        return self.fills_gaps and self.conditions is not None and self.conditions.fills_gaps

    def load(self, condition: Condition) -> None:
        """See `edge.decoding.blocks.ConditionedRows`. Raises BundleError for a graph that cannot be used."""
        assert self.conditions is not None
        self.conditions.load(condition, lambda role: self._check_conditioned(role, condition))

    def _check_conditioned(self, role: Role, condition: Condition) -> None:
        """As `_check`."""
        conditions = self.conditions
        assert conditions is not None
        file, guided = conditions.graphs.file(role), role == "step.guided"
        if role != "prefill.conditioned":
            caches = [*self._cache, *(f"{PLAIN}{name}" for name in self._cache if guided)]
            needed = {*STEP_INPUTS, *caches, *conditions.memory_names(), *["guidance"] * guided}
            made = {*RowScores._fields, *(f"new_{name}" for name in caches)}
            check_names(file, conditions.graphs.open(role, self._alone), (needed, made))
        slot = self.open_slot()
        self.encode(slot, condition)
        self._try_rows(role, slot, file)

    def encode(self, slot: Slot, condition: Condition) -> None:
        """See `edge.decoding.blocks.ConditionedRows`."""
        assert self.conditions is not None
        slot.condition = self.conditions.remember(condition, self._caches(PLAIN) if condition.guidance else {})

    def narrow(self, slot: Slot, remaining: Remaining) -> None:
        """See `edge.decoding.blocks.ConditionedRows`. With nothing left, passes are those of requests without one."""
        if remaining.nothing:
            slot.condition = None
        else:
            slot.condition.hide(remaining.hidden, self._shape[1])

    def prefill(self, slot: Slot, tokens: Ids, positions: Ids) -> None:
        """See `edge.decoding.blocks.RowsBackend`."""
        feed = {"tokens": tokens[None], "positions": positions[None]}
        remembered: Remembered | None = slot.condition
        if remembered is None:
            _keep(self._graphs.open("prefill", 1), feed, slot.memory.cache)
        else:
            assert self.conditions is not None
            session = self.conditions.graphs.open("prefill.conditioned", 1)
            _keep(session, feed | self.conditions.inputs_of("prefill.conditioned", remembered), slot.memory.cache)
            if remembered.plain:
                _keep(self._graphs.open("prefill", 1), feed, remembered.plain, PLAIN)
        slot.positions[: tokens.size] = positions
        slot.cached = tokens.size

    def rows(self, slot: Slot, tokens: Ids, *, positions: Ids, scored: int, under_way: int = 1) -> RowScores:
        """See `edge.decoding.blocks.RowsBackend`."""
        size = self._alone if under_way == 1 else pool_size(self._threads, under_way)
        session, passes = self._pass_of(slot, size)
        shape = size, tokens.size, scored
        bound = passes.get(shape)
        if bound is None:
            bound = self._bind_pass(session, slot, tokens.size, scored)
            if tokens.size <= self.depth + 1:  # those of prompts are seldom of one shape
                passes[shape] = bound
        given, rows = bound.inputs, bound.inputs["tokens"].size
        end = slot.cached + rows
        slot.positions[slot.cached : end] = positions
        given["tokens"][:], given["positions"][:], given["last"][:], given["total"][:] = tokens, positions, end - 1, end
        session.run_with_iobinding(bound.binding)
        return RowScores(bound.outputs["scores"], bound.outputs["states"])

    def draft(self, slot: Slot, state: Floats, *, token: int, noise: Floats, law: Law) -> Ids:
        """See `edge.decoding.blocks.RowsBackend`."""
        session, bound = self._graphs.open("draft", 1), slot.memory.drafting
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

    def _pass_of(self, slot: Slot, size: int) -> tuple[Any, dict[tuple[int, int, int], _Bound]]:
        """The session of a slot's passes, and those bound so far: its condition's, if it has one."""
        remembered: Remembered | None = slot.condition
        if remembered is None:
            return self._graphs.open("step", size), slot.memory.passes
        assert self.conditions is not None
        return self.conditions.graphs.open(remembered.role, size), remembered.passes

    def _bind_pass(self, session: Any, slot: Slot, rows: int, scored: int) -> _Bound:
        """Bind inputs and outputs of a pass; keys and values are written in place."""
        # ONNX Runtime sums a lone row in another order: given twice, it is equal to the bit to any other.
        given: dict[str, NDArray[Any]] = {
            name: np.empty((1, max(2, rows)), np.int32) for name in ("tokens", "positions")
        }
        given |= {name: np.empty(1, np.int32) for name in ("last", "total")}
        given |= {"key_positions": slot.positions, "scored": np.arange(rows - scored, rows, dtype=np.int32)}
        made = {name: np.empty((scored, width), np.float32) for name, width in self._widths.items()}
        remembered: Remembered | None = slot.condition
        if remembered is None:
            return _bound(session, given, made, slot.memory.cache)
        given |= remembered.memory | ({"guidance": remembered.guidance} if remembered.plain else {})
        return _bound(session, given, made, slot.memory.cache | remembered.plain)

    def close(self) -> None:
        """Drop the sessions and their memory."""
        self._graphs.close()
        if self.conditions is not None:
            self.conditions.close()


def _keep(session: Any, feed: Mapping[str, NDArray[Any]], cache: dict[str, Floats], prefix: str = "") -> None:
    """Run a prefill graph, and write the keys and values of its rows to the beginning of the caches."""
    made = session.run(None, feed)
    for name, rows in zip((output.name for output in session.get_outputs()), made, strict=True):
        cache[prefix + name.removeprefix("new_")][:, :, : rows.shape[2]] = rows


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
