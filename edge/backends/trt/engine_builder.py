"""The process that `build_process` starts: ONNX in, TensorRT engine out.

Prints one JSON object a line: {"phase", "done", "of"}, {"severity", "message"} of TensorRT, and last {"engine"} or
{"error"}.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import msgspec
from msgspec import Struct

from edge.backends.trt import engine_cache as engines
from edge.backends.trt import kernels
from edge.backends.trt.driver import Gpu
from edge.backends.trt.find_tensorrt import import_tensorrt, make_logger
from edge.backends.trt.profiles import check_servable
from edge.system.privileges import become_nobody
from shared.errors import ConfigError, DeviceError, DiffusionLLMError
from shared.manifest import Manifest, Role, find_graph, graph_bytes, read_manifest

LEVEL: Final = 3  # TensorRT's default effort; 4 and 5 take several times as long
NO_ROOM: Final = re.compile(r"out ?of ?memory|insufficient memory|memory allocation|cudaErrorMemory", re.IGNORECASE)
"""How TensorRT's errors report it."""


class Order(Struct, frozen=True, forbid_unknown_fields=True):
    """What the parent process requests: an engine of the graph of that role. force: build even if there is one."""

    bundle: str
    cache: str
    workspace_mib: int
    force: bool
    role: Role = "canvas"


def no_room(what: str, workspace_mib: int) -> str:
    """The error, with its remedy."""
    return f"{what}: stop other programs, add swap, or give it less than --workspace-mib {workspace_mib}"


def say(**words: object) -> None:
    """One line to the parent."""
    print(msgspec.json.encode(words).decode(), flush=True)


def parse(trt: ModuleType, builder: Any, logger: Any, graph: bytes) -> Any:
    """→ the network. Raises DeviceError with the parser's own words."""
    # Never the plain number: STRONGLY_TYPED is 1 in TensorRT 10 and 0 in 11.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        why = "; ".join(f"{e.desc()} (node {e.node()})" for e in errors) or "it gives no reason"
        raise DeviceError(f"TensorRT {trt.__version__} cannot read the bundle's CUDA graph: {why}")
    return network


def build(
    trt: ModuleType,
    logger: Any,
    *,
    graph: bytes,
    shapes: Sequence[tuple[int, int]],
    workspace_mib: int,
    timings: bytes,
    progress: Callable[[str, int, int], None],
) -> tuple[bytes, bytes]:
    """Build an engine with one profile for each shape (batch, length).

    timings: an earlier timing cache, or b""; one that does not fit is replaced.  → engine, timing cache. Raises
    DeviceError.
    """
    builder = trt.Builder(logger)
    network = parse(trt, builder, logger, graph)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    config.builder_optimization_level = LEVEL
    config.max_aux_streams = 0  # the whole step is captured from one stream
    cache = config.create_timing_cache(timings)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):  # damaged, or of another device
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    config.progress_monitor = _monitor(trt, progress)
    for batch, length in shapes:
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            free = iter((batch, length))  # the first free dimension counts requests, the second their positions or rows
            shape = tuple(next(free) if size < 0 else size for size in tensor.shape)
            profile.set_shape(tensor.name, shape, shape, shape)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise DeviceError(f"TensorRT {trt.__version__} built no engine; its messages are above")
    return bytes(engine), bytes(config.get_timing_cache().serialize())


def _monitor(trt: ModuleType, progress: Callable[[str, int, int], None]) -> Any:
    base: Any = trt.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self._steps.get(phase_name, 0))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


def _timing_cache(cache: Path, facts: engines.Facts) -> Path:
    return cache / f"timings-{facts.tensorrt}-{facts.architecture}-{facts.processors}.cache"


def fulfil(order: Order, trt: ModuleType, gpu: Gpu, manifest: Manifest) -> Path:
    """Build the engine unless it exists.  → its folder"""
    folder, cache = Path(order.bundle), Path(order.cache)
    check_servable(manifest)
    graph = find_graph(folder, manifest, "cuda", order.role)
    facts = engines.facts_of(folder, manifest, tensorrt=trt.__version__, gpu=gpu, role=order.role)
    if (place := engines.find(facts, (cache,))) is not None and not order.force:
        return place
    content = graph_bytes(folder, manifest, graph)
    say(phase="kernels", done=0, of=1)
    cubin = kernels.compile_kernels(gpu.architecture)
    errors: list[str] = []

    def report(severity: str, message: str) -> None:
        say(severity=severity, message=message)
        if severity != "WARNING":
            errors.append(message)

    logger = make_logger(trt, report)
    timing_file = _timing_cache(cache, facts)
    timings = timing_file.read_bytes() if timing_file.is_file() else b""
    progress = _throttled(lambda phase, done, of: say(phase=phase, done=done, of=of))
    try:
        engine, timings = build(
            trt,
            logger,
            graph=content,
            shapes=facts.shapes,
            workspace_mib=order.workspace_mib,
            timings=timings,
            progress=progress,
        )
    except (DeviceError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(NO_ROOM.search(message) for message in errors):
            raise DeviceError(no_room(f"TensorRT {trt.__version__} ran out of memory", order.workspace_mib)) from None
        raise
    if trt.Runtime(logger).deserialize_cuda_engine(engine) is None:
        raise DeviceError(f"TensorRT {trt.__version__} rejects the engine that it has just built")
    engines.replace_durably(timing_file, timings)
    return engines.store(facts, engines.Built(engine, cubin), cache)


def _throttled(report: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
    """At most one report per tenth of a phase."""
    last = [("", -1)]

    def throttled(phase: str, done: int, of: int) -> None:
        tenth = (phase, 10 * done // max(of, 1))
        if tenth != last[0]:
            last[0] = tenth
            report(phase, done, of)

    return throttled


def main() -> int:
    """Read the order from the command line, build, and print the result."""
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        print("this program is started by edge.build: see python -m edge.build --help", file=sys.stderr)
        return ConfigError.exit_code
    order = msgspec.json.decode(sys.argv[1], type=Order)
    try:
        manifest = read_manifest(Path(order.bundle))
        find_graph(Path(order.bundle), manifest, "cuda", order.role)
        os.chdir(order.bundle)  # the user nobody cannot pass through every folder above it
        become_nobody()
        order = msgspec.structs.replace(order, bundle=".")
        gpu = Gpu()  # first: without a driver, TensorRT crashes instead of saying so
        place = fulfil(order, import_tensorrt(), gpu, manifest)
        gpu.close()
        say(engine=str(place))
        return 0
    except DiffusionLLMError as error:
        say(error=str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
