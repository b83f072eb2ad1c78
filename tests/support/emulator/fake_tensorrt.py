"""A TensorRT whose engines are ONNX graphs, run by ONNX Runtime when the driver's stream comes to them.

It refuses what a device refuses or answers wrongly: an order of calls, an address, a context that was captured before,
inputs that nobody wrote.
"""

import gc
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from tests.support.emulator.fakes import STALE, FakeDriver, array_at

NUMPY = {"tensor(int32)": np.int32, "tensor(float)": np.float32, "tensor(float16)": np.float16}


class FakeTensorRT:
    """Stands for the module tensorrt; engines are ONNX graphs."""

    __version__ = "10.3.0"

    class ILogger:
        Severity = Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])

        def __init__(self, _: object = None) -> None:
            pass

    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    def __init__(self, driver: FakeDriver, shapes: list[tuple[int, int]]) -> None:
        self.driver, self.shapes = driver, shapes
        self.live: list[str] = []
        self.refuses: set[str] = set()
        self.runs = 0
        outer = self

        class Counted:
            def __init__(self, *_: object) -> None:
                outer.live.append(type(self).__name__)

            def __del__(self) -> None:
                outer.live.remove(type(self).__name__)

        class Runtime(Counted):
            def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
                refused = "engine" in outer.refuses or serialized_engine == STALE
                return None if refused else Engine(serialized_engine)

        class Engine(Counted):
            device_memory_size_v2 = 4096

            def __init__(self, graph: bytes) -> None:
                super().__init__()
                self.profiles: set[int] = set()  # that a context was made for
                options = ort.SessionOptions()
                options.log_severity_level = 3
                self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
                self.inputs = {value.name: value for value in self.session.get_inputs()}
                self.outputs = {value.name: value for value in self.session.get_outputs()}

            def create_execution_context(self, strategy: str) -> Any:
                assert strategy == "user managed", "a context that takes memory of its own"
                return Context(self)

        class Context(Counted):
            """One shape for good: whoever captured it must not find another one in its place."""

            def __init__(self, engine: Engine) -> None:
                super().__init__()
                self.engine, self.at, self.shape = engine, dict[str, int](), dict[str, tuple[int, ...]]()
                self.profile: int | None = None
                self.scratch = False
                self.enqueued = 0

            def changes(self) -> None:
                assert outer.driver.capturing is None, "a context is changed while a stream is captured"
                assert not self.enqueued, "a context that was run is reused for another shape or address"

            def set_device_memory(self, memory: int, size: int) -> None:
                self.changes()
                assert size >= self.engine.device_memory_size_v2, "less scratch memory than the engine needs"
                assert outer.driver.holds(memory, size), "scratch memory that is not the caller's"
                self.scratch = True

            def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
                self.changes()
                assert not self.shape, "shapes are those of a profile: it comes first"
                assert profile_index not in self.engine.profiles, "two contexts of one profile"
                self.engine.profiles.add(profile_index)
                self.profile = profile_index
                return profile_index < len(outer.shapes)

            def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
                self.changes()
                assert self.profile is not None, "a shape before its profile"
                free = iter(outer.shapes[self.profile])
                wanted = tuple(next(free) if isinstance(d, str) else d for d in self.engine.inputs[name].shape)
                self.shape[name] = shape
                return shape == wanted and "shape" not in outer.refuses

            def set_tensor_address(self, name: str, memory: int) -> bool:
                self.changes()
                assert name in self.engine.inputs or name in self.engine.outputs, f"the engine has no {name}"
                assert memory % 256 == 0, f"{name} lies at an address that TensorRT refuses"
                self.at[name] = memory
                return True

            def infer_shapes(self) -> list[str]:
                return [name for name in self.engine.inputs if name not in self.shape]

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                sizes: dict[str, int] = {}
                for value in self.engine.inputs.values():
                    sizes |= {
                        d: n for d, n in zip(value.shape, self.shape[value.name], strict=True) if isinstance(d, str)
                    }
                return tuple(sizes[d] if isinstance(d, str) else d for d in self.engine.outputs[name].shape)

            def execute_async_v3(self, stream_handle: int) -> bool:
                assert self.scratch and {*self.engine.inputs, *self.engine.outputs} == set(self.at), "unbound tensors"
                assert not self.infer_shapes(), "inputs without a shape"
                if "capture" in outer.refuses and outer.driver.capturing is not None:
                    return False
                assert self.enqueued or outer.driver.capturing is None, (
                    "captured before it ever ran: TensorRT loads lazily"
                )
                assert stream_handle in outer.driver.live["cuStreamDestroy"], "no living stream"
                self.enqueued += 1
                outer.driver.run(self.run)
                return "enqueue" not in outer.refuses

            def run(self) -> None:
                outer.runs += 1
                self.check_memory()
                feed = {
                    name: array_at(self.at[name], NUMPY[value.type], *self.shape[name])
                    for name, value in self.engine.inputs.items()
                }
                for name, array in feed.items():
                    if array.dtype == np.float16:
                        assert np.isfinite(array).all(), f"{name} holds what was never written"
                made = self.engine.session.run(list(self.engine.outputs), feed)
                for name, array in zip(self.engine.outputs, made, strict=True):
                    array_at(self.at[name], array.dtype, *array.shape)[...] = array

            def check_memory(self) -> None:
                for name, value in {**self.engine.inputs, **self.engine.outputs}.items():
                    shape = self.shape[name] if name in self.engine.inputs else self.get_tensor_shape(name)
                    size = int(np.prod(shape)) * np.dtype(NUMPY[value.type]).itemsize
                    assert outer.driver.holds(self.at[name], size), f"{name} reaches beyond the caller's memory"

        self.Runtime, self.ICudaEngine, self.IExecutionContext = Runtime, Engine, Context

    def nothing_lives(self) -> bool:
        gc.collect()
        return not self.live
