"""ONNX Runtime on the CPU, for passes of several requests: each has its own cache, all share the products."""

import logging
import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge.backends.ort_session import Graphs, check_names
from edge.decoding.blocks import SLOTS, Slot
from edge.decoding.together import REQUESTS, ROWS, Seats, share_of_a_lane
from edge.decoding.types import Floats
from edge.system.locked import Locked
from shared.errors import BundleError, one_line
from shared.manifest import Manifest, Role

log = logging.getLogger(__name__)

ROLE: Final[Role] = "step.shared"
TABLES: Final = SLOTS // REQUESTS
"""Of a thread. In one lane eight requests are computed by fours in turn: with one table each would be bound anew."""


class OrtShared:
    """The graph of several requests, open where a lane may have so many. Without it a pass takes one request.

    batches, degraded: see `edge.decoding.together.SharedRows`. alone: why no pass is shared though the graph runs; None
    otherwise. Raises BundleError for a damaged file.
    """

    def __init__(self, graphs: Graphs, manifest: Manifest, lanes: int) -> None:
        import onnxruntime as ort  # loaded already, by the step graph's session

        self._graphs, self._vocab_size = graphs, manifest.model.vocab_size
        self.batches: tuple[int, ...] = (1,)
        self.degraded: str | None = None
        self.alone: str | None = None
        self._reasons: Locked[list[Exception]] = Locked([])
        self._local = threading.local()
        if not graphs.has(ROLE):
            return
        graphs.verify(ROLE)
        # The constants lie in other graphs' files, which runtimes before 1.23 cannot be given.
        able = hasattr(ort.SessionOptions, "add_external_initializers_from_files_in_memory")
        if able and share_of_a_lane(SLOTS, lanes) >= REQUESTS:
            self.batches = (1, REQUESTS)
            try:
                self._check(manifest.model.layers)
            except BundleError as error:
                self.share_no_more(error)

    def _check(self, layers: int) -> None:
        """Open it. Raises BundleError when it reads or makes something else."""
        session, file = self._graphs.open(ROLE, 1), self._graphs.file(ROLE)
        caches = [f"{kind}.{i}" for i in range(layers) for kind in ("keys", "values")]
        own = [f"{name}.{r}" for r in range(REQUESTS) for name in ("key_positions", "last", "total", *caches)]
        made = {f"new_{name}" for name in own if name.startswith(("keys.", "values."))}
        given = {"tokens", "positions", "noise", "temperature", *own}
        check_names(file, session, (given, {"scores", "drafts", *made}))

    def share_no_more(self, error: Exception) -> None:
        """See `edge.decoding.together.SharedRows`. Warns once, with the traceback, and closes the graph."""
        with self._reasons as reasons:
            reasons.append(error)
            if len(reasons) > 1:  # of another lane, whose pass had begun, and may have opened it again
                self._close()
                return
            effect, file = "no requests share a pass, so many at once take longer", self._graphs.file(ROLE)
            if isinstance(error, BundleError):
                todo = "export the bundle again, or install another ONNX Runtime"
                self.degraded = f"{file} cannot be used, and {effect}: {todo} ({error})"
            else:
                why = f"a pass of several requests has failed ({one_line(f'{type(error).__name__}: {error}')})"
                self.degraded = f"{why}, and until the daemon starts again {effect}"
            log.warning("%s", self.degraded, exc_info=error.__cause__ if isinstance(error, BundleError) else error)
            self._close()

    def stay_alone(self, why: str) -> None:
        """Close a graph that runs, and whose texts might be others. Nothing is broken: on another processor the last
        bits of a sum may differ."""
        self.alone = f"{self._graphs.file(ROLE)} is not used on this processor: {why}; no requests share a pass"
        log.info("%s", self.alone)
        self._close()

    def _close(self) -> None:
        self.batches = (1,)
        self._local = threading.local()
        self._graphs.close_one(ROLE)

    def leave(self) -> None:
        """Forget the slots at this thread's places, and with them their memory."""
        self._local = threading.local()

    def seat(self, slots: Sequence[Slot], caches: Sequence[dict[str, Floats]]) -> Seats:
        """See `edge.decoding.together.SharedRows`. caches: of the slots, by the names of a step graph's inputs."""
        tables: list[_Table] = self._local.__dict__.setdefault("tables", [])
        table = max(tables, key=lambda table: table.seated(slots), default=None)
        if table is None or (table.seated(slots) < REQUESTS and len(tables) < TABLES):
            table = _Table(self._graphs.open(ROLE, 1), self._vocab_size)
            tables.append(table)
        self._local.table = table
        return table.seat(slots, caches)

    def run(self, seats: Seats) -> None:
        """See `edge.decoding.together.SharedRows`."""
        self._local.table.run(seats)


class _Table:
    """One thread's inputs and outputs, bound to memory; a slot's cache is bound when it takes a place."""

    def __init__(self, session: Any, vocab_size: int) -> None:
        self._session, self._binding = session, session.io_binding()
        self._slots: list[Slot | None] = [None] * REQUESTS
        self._given: dict[str, NDArray[Any]] = {
            "tokens": np.zeros((1, ROWS * REQUESTS), np.int32),
            "positions": np.zeros((1, ROWS * REQUESTS), np.int32),
            "noise": np.zeros((REQUESTS, ROWS + 1, vocab_size), np.float32),
            "temperature": np.zeros((REQUESTS, 1, 1), np.float32),
        }
        self._ends = [(np.zeros(1, np.int32), np.zeros(1, np.int32)) for _ in range(REQUESTS)]
        self._made: dict[str, NDArray[Any]] = {
            "scores": np.empty((ROWS * REQUESTS, vocab_size), np.float32),
            "drafts": np.empty(ROWS * REQUESTS, np.int32),
        }
        for name, array in self._given.items():
            self._bind(name, array)
        for place, (last, total) in enumerate(self._ends):
            self._bind(f"last.{place}", last)
            self._bind(f"total.{place}", total)
        for name, array in self._made.items():
            self._bind(name, array, output=True)

    def _bind(self, name: str, array: Any, output: bool = False) -> None:
        import onnxruntime as ort

        bind = self._binding.bind_ortvalue_output if output else self._binding.bind_ortvalue_input
        bind(name, ort.OrtValue.ortvalue_from_numpy(array))

    def seated(self, slots: Sequence[Slot]) -> int:
        """How many of them have a place here."""
        return sum(slot in slots for slot in self._slots)

    def seat(self, slots: Sequence[Slot], caches: Sequence[dict[str, Floats]]) -> Seats:
        free = [place for place, slot in enumerate(self._slots) if slot is None or slot not in slots]
        for slot, cache in zip(slots, caches, strict=True):
            if slot in self._slots:
                continue
            place = free.pop()
            self._slots[place] = slot
            self._bind(f"key_positions.{place}", slot.positions)
            for name, array in cache.items():
                self._bind(f"{name}.{place}", array)
                self._bind(f"new_{name}.{place}", array, output=True)
        places, given, made = len(self._slots), self._given, self._made
        return Seats(
            order=[slots.index(slot) for slot in self._slots if slot is not None],
            tokens=given["tokens"].reshape(places, ROWS),
            positions=given["positions"].reshape(places, ROWS),
            noise=given["noise"],
            temperatures=given["temperature"].reshape(places),
            scores=made["scores"].reshape(places, ROWS, -1),
            drafts=made["drafts"].reshape(places, ROWS),
        )

    def run(self, seats: Seats) -> None:
        for place, (slot, (last, total)) in enumerate(zip(self._slots, self._ends, strict=True)):
            assert slot is not None
            end = slot.cached + ROWS
            slot.positions[slot.cached : end] = seats.positions[place]
            last[0], total[0] = end - 1, end
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime raises types of its own that share no public base
            raise BundleError(f"it does not run: {type(error).__name__}: {error}") from error
