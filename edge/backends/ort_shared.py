"""ONNX Runtime on the CPU, for passes of several requests: each has its own cache, all share the products."""

import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge.backends.ort_session import Graphs, check_names
from edge.decoding.blocks import Slot
from edge.decoding.together import ROWS, Seats
from edge.decoding.types import Floats
from shared.errors import BundleError
from shared.manifest import Manifest, Role

ROLE: Final[Role] = "step.shared"


class OrtShared:
    """The graph of several requests. requests: of a pass; 1 where the bundle or the runtime cannot.

    Raises BundleError for a graph that cannot be used.
    """

    def __init__(self, graphs: Graphs, manifest: Manifest) -> None:
        import onnxruntime as ort  # loaded already, by the step graph's session

        self._graphs, self._vocab_size = graphs, manifest.model.vocab_size
        # The constants lie in other graphs' files, which runtimes before 1.23 cannot be given.
        usable = graphs.has(ROLE) and hasattr(ort.SessionOptions, "add_external_initializers_from_files_in_memory")
        self.requests = 1
        if usable:
            session = graphs.open(ROLE, 1)
            noise: list[Any] = next((value.shape for value in session.get_inputs() if value.name == "noise"), [])
            if noise[1:] != [ROWS + 1, self._vocab_size] or not isinstance(noise[0], int):
                raise BundleError(f"{graphs.file(ROLE)} reads noise of shape {noise}, of another network")
            self.requests = noise[0]
            caches = [f"{kind}.{i}" for i in range(manifest.model.layers) for kind in ("keys", "values")]
            own = [f"{name}.{r}" for r in range(self.requests) for name in ("key_positions", "last", "total", *caches)]
            made = {f"new_{name}" for name in own if name.startswith(("keys.", "values."))}
            given = {"tokens", "positions", "noise", "temperature", *own}
            check_names(graphs.file(ROLE), session, (given, {"scores", "drafts", *made}))
        self._local = threading.local()

    def seat(self, slots: Sequence[Slot], caches: Sequence[dict[str, Floats]]) -> Seats:
        """See `edge.decoding.together.SharedRows`. caches: of the slots, by the names of a step graph's inputs."""
        table: _Table | None = getattr(self._local, "table", None)
        if table is None:
            table = self._local.table = _Table(self._graphs.open(ROLE, 1), self.requests, self._vocab_size)
        return table.seat(slots, caches)

    def run(self, seats: Seats) -> None:
        """See `edge.decoding.together.SharedRows`."""
        self._local.table.run(seats)


class _Table:
    """One thread's inputs and outputs, bound to memory; a slot's cache is bound when it takes a place."""

    def __init__(self, session: Any, requests: int, vocab_size: int) -> None:
        self._session, self._binding = session, session.io_binding()
        self._slots: list[Slot | None] = [None] * requests
        self._given: dict[str, NDArray[Any]] = {
            "tokens": np.zeros((1, ROWS * requests), np.int32),
            "positions": np.zeros((1, ROWS * requests), np.int32),
            "noise": np.zeros((requests, ROWS + 1, vocab_size), np.float32),
            "temperature": np.zeros((requests, 1, 1), np.float32),
        }
        self._ends = [(np.zeros(1, np.int32), np.zeros(1, np.int32)) for _ in range(requests)]
        self._made: dict[str, NDArray[Any]] = {
            "scores": np.empty((ROWS * requests, vocab_size), np.float32),
            "drafts": np.empty(ROWS * requests, np.int32),
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
        self._session.run_with_iobinding(self._binding)
