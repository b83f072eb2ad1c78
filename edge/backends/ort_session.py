"""ONNX Runtime sessions on the CPU, with the options and the environment that all of them share."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def open_session(
    graph: bytes, threads: int = 0, profile: Path | None = None, sizes: Mapping[str, int] | None = None
) -> Any:
    """An `onnxruntime.InferenceSession` over a serialized graph. It raises the runtime's own exceptions.

    threads: of one run, the caller's included; 0: as many as the machine has. profile: prefix of a file for the
    record of each node's time. sizes: of dimensions that the graph leaves open, by name.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read at import: wheels from 1.29 on report usage
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # it keeps a plan for every combination of input shapes
    # Else the threads of a finished run spin for 20 ms, on cores that the next run needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
