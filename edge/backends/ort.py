"""ONNX Runtime on the CPU."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends import StepResult
from edge.decoding.canvas import active_length
from shared.errors import BundleError
from shared.manifest import Manifest, find_graph, verified_bytes
from shared.tokens import BOS, MASK

OUTPUTS = ["ids", "logp", "entropy"]


def one_line(error: Exception) -> str:
    """ONNX Runtime's words without their line breaks."""
    return " ".join(str(error).split())


class OrtBackend:
    """The bundle's CPU graph. One session serves every length: one for each would hold the weights three times.

    A canvas by itself gets every thread. As many canvases as there are threads get one each, from a second session:
    threads that do not wait for each other do more. What a canvas scores is the same either way, to the bit.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int, profile: Path | None = None) -> None:
        """profile: where to write ONNX Runtime's record of each node's time, for `edge.bench`."""
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # wheels from 1.29 on report home unless told before the import
        threads = threads or len(os.sched_getaffinity(0))
        graph = find_graph(folder, manifest, "cpu")
        file, content = folder / graph.file, verified_bytes(folder, graph.file, graph.sha256)
        self._session = _open(file, content, threads, profile)
        self._inputs = [i.name for i in self._session.get_inputs()]
        found = self._inputs, [o.name for o in self._session.get_outputs()]
        needed = ["canvas", "t", "wanted"] if manifest.model.time_input else ["canvas", "wanted"]
        if found not in ((needed, OUTPUTS), (needed[:-1], OUTPUTS)):
            raise BundleError(f"{file} has inputs and outputs {found}, not {(needed, OUTPUTS)}")
        self._top_k = manifest.top_k
        longest = manifest.model.canvas_len
        # Requests of one length may share a pass; each canvas is then cut to its own.
        self.lengths: tuple[int, ...] = tuple(n for n in (longest // 4, longest // 2, longest) if n >= 16)
        for length in (2, longest):
            self._warm_up(length, file)
        # Never several canvases in one run: INT8 graphs scale activations by all that a run holds, and a neighbour
        # would change the text.
        self.batches: tuple[int, ...] = tuple(sorted({1, threads}))
        self._lane = self._session if threads == 1 else _open(file, content, 1)
        self._others = ThreadPoolExecutor(max(1, threads - 1), "lane")  # starts a thread when it is first needed

    def _warm_up(self, length: int, file: Path) -> None:
        canvas = np.full((1, length), MASK, np.int32)
        canvas[:, 0] = BOS
        try:
            found = [
                output.shape for output in self._run(self._session, canvas, np.ones(1, np.float32), canvas == MASK)
            ]
        except Exception as error:  # of onnxruntime, as below
            raise BundleError(f"{file} does not run at length {length}: {one_line(error)}") from None
        expected = [(length - 1, self._top_k), (length - 1, self._top_k), (length - 1,)]
        if found != expected:
            raise BundleError(f"{file} gives {OUTPUTS} of shapes {found}, not {expected}")

    def _run(self, session: Any, canvas: NDArray[np.int32], t: NDArray[np.float32], wanted: NDArray[np.bool_]) -> Any:
        feed = {"canvas": canvas, "t": t, "wanted": np.flatnonzero(wanted).astype(np.int32)}
        return session.run(OUTPUTS, {name: feed[name] for name in self._inputs})

    def step(self, canvas: NDArray[np.int32], t: NDArray[np.float32], wanted: NDArray[np.bool_]) -> StepResult:
        """One pass for each canvas. The graph scores wanted positions only; that of an older bundle all masked ones."""
        scored_at = wanted if "wanted" in self._inputs else canvas == MASK
        shape = (*canvas.shape, self._top_k)
        result = StepResult(np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(canvas.shape, np.float32))
        session = self._session if len(canvas) == 1 else self._lane

        def score(row: int) -> None:
            active = slice(0, active_length(canvas[row]))
            found = self._run(session, canvas[row : row + 1, active], t[row : row + 1], wanted[row, active])
            for whole, scored in zip(result, found, strict=True):
                whole[row, active][scored_at[row, active]] = scored

        others = self._others.map(score, range(1, len(canvas)))
        score(0)
        list(others)  # waits, and raises what one of them raised
        return result

    def end_profile(self) -> Path:
        """Finish the record begun with `profile`.  → its file"""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Drop the sessions and their memory."""
        self._others.shutdown()
        del self._session, self._lane


def _open(file: Path, content: bytes, threads: int, profile: Path | None = None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_free_dimension_override_by_name("batch", 1)
    options.enable_mem_pattern = False  # it keeps a plan for every pair of length and number wanted, for good
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises types of its own that share no public base
        raise BundleError(f"{file} cannot be loaded by ONNX Runtime: {one_line(error)}") from None
