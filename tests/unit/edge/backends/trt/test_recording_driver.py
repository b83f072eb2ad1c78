"""The recording driver and its TensorRT refuse what a device would refuse, or do wrong without a word.

Each test is a call that the proofs above them would otherwise let pass.
"""

import ctypes
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge.backends.trt import kernels
from tests.support.emulator.fake_tensorrt import FakeTensorRT
from tests.support.emulator.fakes import FakeDriver

pytestmark = pytest.mark.proof("4. the TensorRT backend over a recording driver, and below NVIDIA's own bindings")

KERNEL = "keep_rows"
NO_NUMBERS = ((), ())


class Board:
    """A driver with a stream, an event, a module, memory and a captured graph of nothing."""

    def __init__(self) -> None:
        launch = SimpleNamespace(launch=lambda function, grid, values: None)
        self.driver = FakeDriver(launch)  # type: ignore[arg-type]
        self.call("cuInit", 0)
        self.context = self.call("cuDevicePrimaryCtxRetain", 0)
        self.call("cuCtxSetCurrent", self.context)
        self.stream = self.call("cuStreamCreate", 1)
        self.event = self.call("cuEventCreate", 1)
        self.module = self.call("cuModuleLoadData", b"cubin")
        self.call("cuModuleGetFunction", self.module, KERNEL.encode())
        self.memory = self.call("cuMemAlloc", 1000)
        self.call("cuStreamBeginCapture", self.stream, 1)
        self.graph = self.call("cuStreamEndCapture", self.stream)
        self.executable = self.call("cuGraphInstantiate", self.graph, 0)

    def call(self, name: str, *arguments: Any) -> Any:
        """→ what the function makes, without its code"""
        _, *values = getattr(self.driver, name)(*arguments)
        return values[0] if values else None

    def launch(self, grid: tuple[int, int, int] = (1, 1, 1), threads: int = kernels.THREADS, **more: Any) -> None:
        given = {"stream": self.stream, "arguments": NO_NUMBERS, "function": KERNEL} | more
        block = (threads, 1, 1, 0)
        self.call("cuLaunchKernel", given["function"], *grid, *block, given["stream"], given["arguments"], 0)


@pytest.fixture
def board() -> Board:
    return Board()


def pointers(*values: int) -> tuple[tuple[int, ...], tuple[type, ...]]:
    return values, (ctypes.c_void_p,) * len(values)


def test_recording_driver_takes_what_is_right(board: Board) -> None:
    """Each refusal below differs from one of these in one thing."""
    board.call("cuMemsetD8Async", board.memory, 0, 1000, board.stream)
    board.call("cuMemcpyHtoD", board.memory, np.zeros(1000, np.uint8).ctypes.data, 1000)
    board.call("cuEventRecord", board.event, board.stream)
    board.call("cuEventSynchronize", board.event)
    board.call("cuGraphLaunch", board.executable, board.stream)
    board.launch(arguments=pointers(board.memory, board.memory + 999))
    board.call("cuStreamBeginCapture", board.stream, 1)
    board.launch(arguments=pointers(board.memory))
    graph = board.call("cuStreamEndCapture", board.stream)
    executable = board.call("cuGraphInstantiate", graph, 0)
    board.call("cuGraphDestroy", graph)
    board.call("cuGraphLaunch", executable, board.stream)


WRONG: dict[str, tuple[str, Callable[[Board], object]]] = {
    "stream of the legacy kind": ("legacy stream", lambda b: b.call("cuStreamCreate", 0)),
    "event that spins": ("spin", lambda b: b.call("cuEventCreate", 2)),
    "host memory that is not mapped": ("does not see", lambda b: b.call("cuMemHostAlloc", 8, 0)),
    "too few arguments": ("takes 4 arguments, not 3", lambda b: b.call("cuMemsetD8Async", b.memory, 0, 8)),
    "too many arguments": ("takes 1 arguments, not 2", lambda b: b.call("cuMemAlloc", 8, 0)),
    "unknown function": ("adds it to PARAMETERS", lambda b: b.call("cuMemAllocAsync", 8)),
    "memset beyond its memory": ("not the caller's", lambda b: b.call("cuMemsetD8Async", b.memory, 0, 1001, b.stream)),
    "copy beyond its memory": ("not the caller's", lambda b: b.call("cuMemcpyHtoD", b.memory + 1, 0, 1000)),
    "copy to the host's memory": ("not the caller's", lambda b: b.call("cuMemcpyHtoD", id(b), 0, 8)),
    "launch on no stream": ("no living stream", lambda b: b.launch(stream=0)),
    "launch of other blocks": ("another size", lambda b: b.launch(threads=32)),
    "launch of an empty grid": ("no grid", lambda b: b.launch(grid=(1, 0, 1))),
    "launch of a grid too large": ("no grid", lambda b: b.launch(grid=(1, 65536, 1))),
    "launch with kinds missing": ("without a kind", lambda b: b.launch(arguments=((1, 2), (ctypes.c_int,)))),
    "launch of an unknown function": ("no loaded module", lambda b: b.launch(function="draw")),
    "launch on the host's memory": ("not the caller's", lambda b: b.launch(arguments=pointers(id(b)))),
    "launch behind its memory": ("not the caller's", lambda b: b.launch(arguments=pointers(b.memory + 1000))),
    "event recorded on no stream": ("no living stream", lambda b: b.call("cuEventRecord", b.event, b.event)),
    "wait for what is no event": ("no living event", lambda b: b.call("cuEventSynchronize", b.stream)),
    "graph that is not executable": ("executable graph", lambda b: b.call("cuGraphLaunch", b.graph, b.stream)),
    "executable of no graph": ("no living graph", lambda b: b.call("cuGraphInstantiate", b.executable, 0)),
    "function of no module": ("no living module", lambda b: b.call("cuModuleGetFunction", b.stream, b"draw")),
    "end of no capture": ("no stream is captured", lambda b: b.call("cuStreamEndCapture", b.stream)),
}


@pytest.mark.parametrize("what", WRONG)
def test_recording_driver_refuses(board: Board, what: str) -> None:
    words, wrong = WRONG[what]
    with pytest.raises(AssertionError, match=words):
        wrong(board)


IN_CAPTURE: dict[str, Callable[[Board], object]] = {
    "allocation": lambda b: b.call("cuMemAlloc", 8),
    "mapped allocation": lambda b: b.call("cuMemHostAlloc", 8, FakeDriver.CU_MEMHOSTALLOC_DEVICEMAP),
    "freeing": lambda b: b.call("cuMemFree", b.memory),
    "copy": lambda b: b.call("cuMemcpyHtoD", b.memory, np.zeros(8, np.uint8).ctypes.data, 8),
    "event": lambda b: b.call("cuEventRecord", b.event, b.stream),
    "wait": lambda b: b.call("cuEventSynchronize", b.event),
    "second capture": lambda b: b.call("cuStreamBeginCapture", b.stream, 1),
    "graph launch": lambda b: b.call("cuGraphLaunch", b.executable, b.stream),
}


@pytest.mark.parametrize("what", IN_CAPTURE)
def test_recording_driver_refuses_in_a_capture(board: Board, what: str) -> None:
    board.call("cuStreamBeginCapture", board.stream, 1)
    with pytest.raises(AssertionError, match="captured"):
        IN_CAPTURE[what](board)


FREED: dict[str, tuple[Callable[[Board], object], Callable[[Board], object]]] = {
    "memory": (
        lambda b: b.call("cuMemFree", b.memory),
        lambda b: b.call("cuMemsetD8Async", b.memory, 0, 8, b.stream),
    ),
    "memory in a launch": (
        lambda b: b.call("cuMemFree", b.memory),
        lambda b: b.launch(arguments=pointers(b.memory)),
    ),
    "stream": (lambda b: b.call("cuStreamDestroy", b.stream), lambda b: b.launch()),
    "event": (lambda b: b.call("cuEventDestroy", b.event), lambda b: b.call("cuEventSynchronize", b.event)),
    "module": (lambda b: b.call("cuModuleUnload", b.module), lambda b: b.launch()),
    "graph": (
        lambda b: b.call("cuGraphExecDestroy", b.executable),
        lambda b: b.call("cuGraphLaunch", b.executable, b.stream),
    ),
    "context": (
        lambda b: b.call("cuDevicePrimaryCtxRelease", b.context),
        lambda b: b.call("cuMemAlloc", 8),
    ),
}


@pytest.mark.parametrize("what", FREED)
def test_recording_driver_refuses_what_was_freed(board: Board, what: str) -> None:
    free, use = FREED[what]
    free(board)
    with pytest.raises(AssertionError):
        use(board)


def test_recording_driver_refuses_to_free_twice(board: Board) -> None:
    board.call("cuMemFree", board.memory)
    with pytest.raises(KeyError):
        board.call("cuMemFree", board.memory)


def test_recording_driver_runs_a_captured_launch_on_memory_of_its_own_time(board: Board) -> None:
    """A graph keeps addresses: what was freed since is refused as it is launched."""
    board.call("cuStreamBeginCapture", board.stream, 1)
    board.launch(arguments=pointers(board.memory))
    executable = board.call("cuGraphInstantiate", board.call("cuStreamEndCapture", board.stream), 0)
    board.call("cuMemFree", board.memory)
    with pytest.raises(AssertionError, match="not the caller's"):
        board.call("cuGraphLaunch", executable, board.stream)


def test_recording_driver_wants_to_be_started_first() -> None:
    driver: Any = FakeDriver(None)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="before cuInit"):
        driver.cuDeviceGetCount()


def test_recording_driver_wants_the_context_in_every_thread(board: Board) -> None:
    refused: list[str] = []

    def allocate() -> None:
        try:
            board.call("cuMemAlloc", 8)
        except AssertionError as error:
            refused.append(str(error))

    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    assert refused == ["cuMemAlloc without a context"]


def test_recording_driver_notices_codes_that_nobody_looks_at(board: Board) -> None:
    code, _ = board.driver.cuMemAlloc(8)
    assert board.driver.checked["cuMemAlloc"] == 0
    assert code == FakeDriver.CUresult.CUDA_SUCCESS and board.driver.checked["cuMemAlloc"] == 1


# --- its TensorRT -----------------------------------------------------------------------------------------------------


class Engine:
    """A context of an engine that doubles FP16 numbers (rows, 4), set up in the right order as far as a test asks."""

    def __init__(self, board: Board) -> None:
        self.board = board
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            [helper.make_node("Add", ["x", "x"], ["y"])],
            "double",
            [info("x", TensorProto.FLOAT16, ["rows", 4])],
            [info("y", TensorProto.FLOAT16, ["rows", 4])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        self.trt: Any = FakeTensorRT(board.driver, [(2, 4), (3, 4)])
        self.engine = self.trt.Runtime(None).deserialize_cuda_engine(onnx.ModelProto.SerializeToString(model))
        self.scratch, self.x, self.y = (board.call("cuMemAlloc", size) for size in (4096, 16, 16))
        self.context = self.new()
        self.steps: dict[str, Callable[[], object]] = {
            "scratch": lambda: self.context.set_device_memory(self.scratch, 4096),
            "profile": lambda: self.context.set_optimization_profile_async(0, board.stream),
            "shape": lambda: self.context.set_input_shape("x", (2, 4)),
            "x": lambda: self.context.set_tensor_address("x", self.x),
            "y": lambda: self.context.set_tensor_address("y", self.y),
        }
        board.call("cuMemsetD8Async", self.x, 0, 16, board.stream)

    def new(self) -> Any:
        return self.engine.create_execution_context("user managed")

    def set_up(self, *left_out: str) -> "Engine":
        for name, step in self.steps.items():
            if name not in left_out:
                step()
        return self

    def run(self) -> bool:
        done: bool = self.context.execute_async_v3(self.board.stream)
        return done


@pytest.fixture
def engine(board: Board) -> Engine:
    return Engine(board)


def test_recording_tensorrt_runs_what_is_set_up(engine: Engine) -> None:
    assert engine.set_up().run()
    engine.board.call("cuStreamBeginCapture", engine.board.stream, 1)
    assert engine.run()


@pytest.mark.parametrize("left_out", ["scratch", "profile", "shape", "x", "y"])
def test_recording_tensorrt_refuses_a_context_without(engine: Engine, left_out: str) -> None:
    with pytest.raises(AssertionError):
        engine.set_up(left_out).run()


MISUSED: dict[str, tuple[str, Callable[[Engine], object]]] = {
    "profile after shapes": (
        "it comes first",
        lambda e: e.set_up().context.set_optimization_profile_async(1, e.board.stream),
    ),
    "one profile for two contexts": (
        "two contexts",
        lambda e: e.set_up().new().set_optimization_profile_async(0, e.board.stream),
    ),
    "address that is not aligned": ("TensorRT refuses", lambda e: e.context.set_tensor_address("x", e.x + 2)),
    "unknown tensor": ("has no z", lambda e: e.context.set_tensor_address("z", e.x)),
    "too little scratch memory": ("less scratch", lambda e: e.context.set_device_memory(e.scratch, 4095)),
    "scratch memory of somebody else": ("not the caller's", lambda e: e.context.set_device_memory(e.x, 4096)),
    "another strategy": ("memory of its own", lambda e: e.engine.create_execution_context("static")),
    "no stream": ("no living stream", lambda e: e.set_up().context.execute_async_v3(0)),
}


@pytest.mark.parametrize("what", MISUSED)
def test_recording_tensorrt_refuses(engine: Engine, what: str) -> None:
    words, misuse = MISUSED[what]
    with pytest.raises(AssertionError, match=words):
        misuse(engine)


def test_recording_tensorrt_says_no_to_shapes_of_no_profile(engine: Engine) -> None:
    engine.set_up("shape")
    assert not engine.context.set_input_shape("x", (3, 4))
    assert not engine.new().set_optimization_profile_async(2, engine.board.stream)


@pytest.mark.parametrize("step", ["scratch", "shape", "x"])
def test_recording_tensorrt_refuses_another_shape_or_address_after_a_run(engine: Engine, step: str) -> None:
    engine.set_up().run()
    with pytest.raises(AssertionError, match="reused for another"):
        engine.steps[step]()


def test_recording_tensorrt_refuses_a_change_in_a_capture(engine: Engine) -> None:
    engine.set_up("y").board.call("cuStreamBeginCapture", engine.board.stream, 1)
    with pytest.raises(AssertionError, match="while a stream is captured"):
        engine.steps["y"]()


def test_recording_tensorrt_refuses_a_capture_before_the_first_run(engine: Engine) -> None:
    engine.set_up().board.call("cuStreamBeginCapture", engine.board.stream, 1)
    with pytest.raises(AssertionError, match="captured before it ever ran"):
        engine.run()


def test_recording_tensorrt_refuses_inputs_that_nobody_wrote(engine: Engine) -> None:
    engine.x = engine.board.call("cuMemAlloc", 16)
    with pytest.raises(AssertionError, match="never written"):
        engine.set_up().run()


def test_recording_tensorrt_refuses_tensors_beyond_their_memory(engine: Engine) -> None:
    engine.y = engine.board.call("cuMemAlloc", 15)
    with pytest.raises(AssertionError, match="reaches beyond"):
        engine.set_up().run()
