"""ONNX Runtime sessions on the CPU, with the options that all of them share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from edge.system.locked import Locked
from shared.errors import BundleError, one_line
from shared.manifest import Manifest, Role, find_graph, has_role, verified_bytes

MOST_NAMED: Final = 4
"""Inputs or outputs in a sentence."""


def open_session(
    graph: bytes,
    threads: int = 0,
    *,
    profile: Path | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession` over a serialized graph. It raises the runtime's own exceptions.

    threads: of one run, the caller's included; 0: as many as the machine has. profile: prefix of a file for the
    record of each node's time. sizes: of dimensions that the graph leaves open, by name.
    """
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
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    session._model_bytes = None  # else it keeps the file's bytes, for a change of providers
    return session


class Graphs:
    """A bundle's graphs for the CPU: each is read, verified and opened when it is asked for. Thread-safe.

    Their bytes are not kept: a further session reads and verifies them again.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._sessions: Locked[dict[tuple[Role, int], Any]] = Locked({})

    def has(self, role: Role) -> bool:
        """Whether the bundle lists a graph of that role."""
        return has_role(self._manifest, "cpu", role)

    def file(self, role: Role) -> Path:
        """Where it is. Raises BundleError when there is none."""
        return self._folder / find_graph(self._folder, self._manifest, "cpu", role).file

    def open(self, role: Role, threads: int) -> Any:
        """A session of so many threads. Raises BundleError."""
        with self._sessions as sessions:
            if (role, threads) not in sessions:
                graph = find_graph(self._folder, self._manifest, "cpu", role)
                content = verified_bytes(self._folder, graph.file, graph.sha256)
                try:
                    sessions[role, threads] = open_session(content, threads)
                except Exception as error:  # onnxruntime raises types of its own that share no public base
                    message = f"{self.file(role)} cannot be loaded by ONNX Runtime: {one_line(str(error))}"
                    raise BundleError(message) from None
            return sessions[role, threads]

    def sizes(self) -> set[tuple[Role, int]]:
        """Role and threads of every session that is open."""
        with self._sessions as sessions:
            return set(sessions)

    def close(self) -> None:
        """Drop the sessions and their memory."""
        with self._sessions as sessions:
            sessions.clear()


def check_names(file: Path, session: Any, needed: tuple[set[str], set[str]]) -> None:
    """Raise BundleError unless a graph has exactly these inputs and outputs; it names what differs."""
    told = []
    for kind, values, wanted in zip(
        ("input", "output"), (session.get_inputs(), session.get_outputs()), needed, strict=True
    ):
        found = {value.name for value in values}
        told += [f"no {kind} {_listed(wanted - found)}"] * (not wanted <= found)
        told += [f"an unknown {kind} {_listed(found - wanted)}"] * (not found <= wanted)
    if told:
        raise BundleError(f"{file} has other inputs and outputs than a graph of its kind: {'; '.join(told)}")


def _listed(names: set[str]) -> str:
    first = sorted(names)[:MOST_NAMED]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")
