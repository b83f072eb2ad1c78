"""The daemon with the real TensorRT backend over the recording driver, whose GPU fails in the middle of its work.

    python -m tests.support.emulator.daemon LIBRARY PASSES [flags of python -m edge]

LIBRARY: the emulator's. PASSES: the GPU makes so many before the host waits in vain for the next; 0: it never fails.
"""

import ctypes
import sys
from pathlib import Path

import edge.backends
from edge.backends.trt.backend import TrtBackend
from edge.backends.trt.driver import CudaMemory, Gpu
from edge.backends.trt.engine_cache import Built
from edge.backends.trt.profiles import buckets
from edge.daemon import main
from shared.errors import run_main
from shared.manifest import Manifest, find_graph, graph_bytes
from tests.support.emulator import Emulator
from tests.support.emulator.fake_tensorrt import FakeTensorRT
from tests.support.emulator.fakes import PROCESSORS, FakeDriver, Result


class FailingDriver(FakeDriver):
    """Its GPU makes only so many passes."""

    def __init__(self, emulator: Emulator, passes: int) -> None:
        super().__init__(emulator)
        self._left = passes

    def _cuGraphLaunch(self, graph: int, stream: int) -> tuple[()]:
        self._left -= 1
        if self._left == -1:
            self.fails["cuEventSynchronize"] = Result.CUDA_ERROR_LAUNCH_FAILED
        return super()._cuGraphLaunch(graph, stream)


def load_failing(folder: Path, manifest: Manifest, threads: int, argument: str) -> edge.backends.Chosen:
    """Stands for the loader of `trt`."""
    driver = FailingDriver(Emulator(ctypes.CDLL(library)), int(passes) or sys.maxsize)
    gpu = Gpu(driver)  # type: ignore[arg-type]
    graph = graph_bytes(folder, manifest, find_graph(folder, manifest, "cuda"))
    trt = FakeTensorRT(driver, buckets(manifest, PROCESSORS))
    backend = TrtBackend(trt, gpu, memory=CudaMemory(gpu), manifest=manifest, built=Built(graph, b"cubin"))  # type: ignore[arg-type]
    return edge.backends.Chosen(backend, "trt")


if __name__ == "__main__":
    library, passes, *flags = sys.argv[1:]
    edge.backends._LOADERS["trt"] = load_failing
    run_main(lambda: main([*flags, "--backend", "trt"]))
