"""ONNX Runtime on the CPU."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.backends import StepResult
from shared.errors import BundleError
from shared.manifest import Manifest, find_graph, verified_bytes

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
        found = tuple(i.name for i in self._session.get_inputs()), [o.name for o in self._session.get_outputs()]
        wanted = ("canvas", "t") if manifest.model.time_input else ("canvas",)
        if found != (wanted, OUTPUTS):
            raise BundleError(f"{folder / graph.file} has inputs and outputs {found}, not {(wanted, OUTPUTS)}")
        self._timed = manifest.model.time_input
        longest = manifest.model.canvas_len
        self.lengths: tuple[int, ...] = tuple(n for n in (longest // 4, longest // 2, longest) if n >= 16)
        # INT8 graphs scale activations by what the whole batch holds: a neighbour would change the text.
        self.batches: tuple[int, ...] = (1,)
        for length in self.lengths:
            self._warm_up(length, manifest.top_k, folder / graph.file)

    def _warm_up(self, length: int, top_k: int, file: Path) -> None:
        try:
            result = self.step(np.zeros((1, length), np.int32), np.ones(1, np.float32))
        except Exception as error:  # as above
            raise BundleError(f"{file} does not run at length {length}: {one_line(error)}") from None
        expected = [(1, length, top_k), (1, length, top_k), (1, length)]
        if (found := [output.shape for output in result]) != expected:
            raise BundleError(f"{file} gives {OUTPUTS} of shapes {found}, not {expected}")

    def step(self, canvas: NDArray[np.int32], t: NDArray[np.float32]) -> StepResult:
        """One pass of the graph."""
        inputs = {"canvas": canvas, "t": t} if self._timed else {"canvas": canvas}
        return StepResult(*self._session.run(OUTPUTS, inputs))

    def end_profile(self) -> Path:
        """Finish the record begun with `profile`.  → its file"""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Drop the session and its memory."""
        del self._session
