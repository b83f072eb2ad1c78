"""ONNX Runtime on the CPU."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.backends import StepResult
from shared.errors import BundleError
from shared.manifest import Manifest, find_graph, verified_bytes
from shared.tokens import BOS, MASK

OUTPUTS = ["ids", "logp", "entropy"]


def one_line(error: Exception) -> str:
    """ONNX Runtime's words without their line breaks."""
    return " ".join(str(error).split())


class OrtBackend:
    """The bundle's CPU graph. One session serves every length: one for each would hold the weights three times."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int, profile: Path | None = None) -> None:
        """profile: where to write ONNX Runtime's record of each node's time, for `edge.bench`."""
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # wheels from 1.29 on report home unless told before the import
        import onnxruntime as ort

        graph = find_graph(folder, manifest, "cpu")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name("batch", 1)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        content = verified_bytes(folder, graph.file, graph.sha256)
        try:
            self._session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises types of its own that share no public base
            raise BundleError(f"{folder / graph.file} cannot be loaded by ONNX Runtime: {one_line(error)}") from None
        self._inputs = [i.name for i in self._session.get_inputs()]
        found = self._inputs, [o.name for o in self._session.get_outputs()]
        needed = ["canvas", "t", "wanted"] if manifest.model.time_input else ["canvas", "wanted"]
        if found not in ((needed, OUTPUTS), (needed[:-1], OUTPUTS)):
            raise BundleError(f"{folder / graph.file} has inputs and outputs {found}, not {(needed, OUTPUTS)}")
        self._top_k = manifest.top_k
        longest = manifest.model.canvas_len
        self.lengths: tuple[int, ...] = tuple(range(2, longest + 1))  # it takes any; the shorter, the faster
        # INT8 graphs scale activations by what the whole batch holds: a neighbour would change the text.
        self.batches: tuple[int, ...] = (1,)
        for length in (2, longest):
            self._warm_up(length, folder / graph.file)

    def _warm_up(self, length: int, file: Path) -> None:
        canvas = np.full((1, length), MASK, np.int32)
        canvas[:, 0] = BOS
        try:
            found = [output.shape for output in self._run(canvas, np.ones(1, np.float32), canvas == MASK)]
        except Exception as error:  # as above
            raise BundleError(f"{file} does not run at length {length}: {one_line(error)}") from None
        expected = [(length - 1, self._top_k), (length - 1, self._top_k), (length - 1,)]
        if found != expected:
            raise BundleError(f"{file} gives {OUTPUTS} of shapes {found}, not {expected}")

    def _run(self, canvas: NDArray[np.int32], t: NDArray[np.float32], wanted: NDArray[np.bool_]) -> Any:
        feed = {"canvas": canvas, "t": t, "wanted": np.flatnonzero(wanted).astype(np.int32)}
        return self._session.run(OUTPUTS, {name: feed[name] for name in self._inputs})

    def step(self, canvas: NDArray[np.int32], t: NDArray[np.float32], wanted: NDArray[np.bool_]) -> StepResult:
        """One pass. The graph scores wanted positions only; that of an older bundle all that are masked."""
        scored_at = wanted if "wanted" in self._inputs else canvas == MASK
        shape = (*canvas.shape, self._top_k)
        result = StepResult(np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(canvas.shape, np.float32))
        for whole, scored in zip(result, self._run(canvas, t, wanted), strict=True):
            whole[scored_at] = scored
        return result

    def end_profile(self) -> Path:
        """Finish the record begun with `profile`.  → its file"""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Drop the session and its memory."""
        del self._session
