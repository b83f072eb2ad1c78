"""ONNX Runtime on the CPU."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from edge.backends.ort_session import open_session
from edge.decoding.types import Ids, Positions, StepResult
from edge.system.locked import Locked
from shared.errors import BundleError
from shared.manifest import Manifest, find_graph, verified_bytes
from shared.tokens import BOS, MASK

OUTPUTS = ["ids", "logp", "entropy"]


def pool_size(threads: int, rows: int) -> int:
    """Threads of a session that `rows` callers use at once, so that callers and helpers are `threads` together.

    Each row gets `threads // rows`, at least its caller.
    """
    rows = min(rows, threads)
    share = threads // rows
    return threads // share * (share - 1) + 1


def _words(error: Exception) -> str:
    return " ".join(str(error).split())  # ONNX Runtime's come with line breaks


class OrtBackend:
    """The bundle's CPU graph. One canvas gets every thread; several share them, in a lane each.

    One canvas per run: INT8 graphs scale activations over everything in a run, so a second canvas would change the
    text of the first. Scores are the same to the bit for any number of threads.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, threads: int, profile: Path | None = None, later: bool = False
    ) -> None:
        """profile: where to write ONNX Runtime's record of each node's time, for `edge.bench`.

        later: the graph's hash is checked now, and its session, 30 MB in a `tiny` network, opens with the first step.
        """
        self.lanes = self._threads = threads or len(os.sched_getaffinity(0))
        self._folder, self._graph = folder, find_graph(folder, manifest, "cpu")
        self._profile = profile
        self._sessions: Locked[dict[int, Any]] = Locked({})
        """By the size of their pool; more open when they are needed."""
        self._takes_time = manifest.model.time_input
        if later:
            verified_bytes(folder, self._graph.file, self._graph.sha256)
        else:
            self._check(manifest.model.canvas_len, manifest.top_k)

    @property
    def _file(self) -> Path:
        return self._folder / self._graph.file

    def _open(self, threads: int, profile: Path | None) -> Any:
        graph = verified_bytes(self._folder, self._graph.file, self._graph.sha256)
        try:
            return open_session(graph, threads, profile=profile, sizes={"batch": 1})
        except Exception as error:  # onnxruntime raises types of its own that share no public base
            raise BundleError(f"{self._file} cannot be loaded by ONNX Runtime: {_words(error)}") from None

    def _check(self, longest: int, top_k: int) -> None:
        """Check inputs and outputs, and run the shortest and the longest length. Raises BundleError."""
        session = self._session(rows=1)
        found = [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]
        needed = ["canvas", "t", "wanted"] if self._takes_time else ["canvas", "wanted"]
        if found != (needed, OUTPUTS):
            raise BundleError(f"{self._file} has inputs and outputs {found}, not {(needed, OUTPUTS)}")
        for length in (2, longest):
            canvas = np.full(length, MASK, np.int32)
            canvas[0] = BOS
            try:
                shapes = [output.shape for output in self.score(canvas, 1.0, np.arange(1, length))]
            except Exception as error:  # of onnxruntime, as above
                raise BundleError(f"{self._file} does not run at length {length}: {_words(error)}") from None
            expected = [(length - 1, top_k), (length - 1, top_k), (length - 1,)]
            if shapes != expected:
                raise BundleError(f"{self._file} gives {OUTPUTS} of shapes {shapes}, not {expected}")

    def _session(self, rows: int) -> Any:
        size = pool_size(self._threads, rows)
        with self._sessions as sessions:
            if size not in sessions:
                sessions[size] = self._open(size, None if sessions else self._profile)
            return sessions[size]

    def score(self, canvas: Ids, t: float, positions: Positions, rows: int = 1) -> StepResult:
        """See `edge.decoding.types.Backend`."""
        feed = {"canvas": canvas[None], "wanted": positions.astype(np.int32)}
        if self._takes_time:
            feed["t"] = np.array([t], np.float32)
        return StepResult(*self._session(rows).run(OUTPUTS, feed))

    def end_profile(self) -> Path:
        """Finish the record begun with `profile`.  → its file"""
        return Path(self._session(rows=1).end_profiling())

    def close(self) -> None:
        """Drop the sessions and their memory."""
        with self._sessions as sessions:
            sessions.clear()
