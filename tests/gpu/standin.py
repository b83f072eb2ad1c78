"""Stands for TensorRT where it is absent: the calls that our backend makes, and the network is torch's own.

On a GPU torch enqueues into the backend's stream, recorded into its CUDA graph or not. On the emulated driver the same
network runs on the processor, as a host function of the stream.
"""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge.backends.trt.driver import Gpu
from edge.decoding.types import Ids, Positions, StepResult
from host.model.network import Denoiser, ends_impossible
from tests.support.emulator.fake_tensorrt import FakeTensorRT
from tests.support.emulator.fakes import array_at
from tests.support.emulator.reference import reduce_logits

EMULATED = "emulated"
"""What the emulated driver calls its GPU."""


class Network:
    """Canvas to FP16 logits, in torch. Each pass runs the same operations on the same shapes."""

    def __init__(self, model: Denoiser, gpu: Gpu) -> None:
        self.device = "cpu" if gpu.name == EMULATED else "cuda"
        self.timed = model.config.time_input
        self._model = model.to(self.device)

    @torch.no_grad()
    def __call__(self, canvas: Tensor, t: Tensor | None) -> Tensor:
        """canvas int32 (B, L), t float32 (B,) if timed → (B, L, V) float16"""
        hidden = self._model.score_canvas(canvas, t)
        scores = self._model.logits(hidden.flatten(0, 1), ends_impossible(canvas).flatten())
        return scores.clamp(min=-1e4).half().view(*canvas.shape, -1)

    def at(self, address: int, shape: tuple[int, ...], kind: type[np.generic]) -> Tensor:
        """The tensor that lies there."""
        if self.device == "cpu":
            return torch.from_numpy(array_at(address, kind, *shape))
        described = {"shape": shape, "typestr": np.dtype(kind).str, "data": (address, False), "version": 3}
        return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=described), device="cuda")


class StandIn:
    """Stands for the module tensorrt. Whatever it is given to load, its engine is `network`."""

    __version__ = "10.3.0"
    ILogger = FakeTensorRT.ILogger
    ExecutionContextAllocationStrategy = FakeTensorRT.ExecutionContextAllocationStrategy
    device_memory_size_v2 = 0

    def __init__(self, gpu: Gpu, network: Network, vocab: int) -> None:
        self.gpu, self.network, self.vocab = gpu, network, vocab

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda engine: self)

    def create_execution_context(self, strategy: str) -> "Context":
        return Context(self)


HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Context:
    """One shape. Torch takes its memory from its own pool of this stream, which nobody else uses: see `_enqueue`."""

    def __init__(self, engine: StandIn) -> None:
        self._engine, self._shape, self._at = engine, dict[str, tuple[int, ...]](), dict[str, int]()
        self._kept: Any = None  # the host function, for as long as a recorded graph may call it

    def set_device_memory(self, memory: int, size: int) -> None:
        """The backend's scratch memory; torch has its own."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._at[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (*self._shape["canvas"], self._engine.vocab)

    def execute_async_v3(self, stream_handle: int) -> bool:
        network, shape = self._engine.network, self._shape["canvas"]
        canvas = network.at(self._at["canvas"], shape, np.int32)
        t = network.at(self._at["t"], shape[:1], np.float32) if network.timed else None
        logits = network.at(self._at["logits"], (*shape, self._engine.vocab), np.float16)
        self._enqueue(lambda: logits.copy_(network(canvas, t)), stream_handle)
        return True

    def _enqueue(self, work: Callable[[], object], stream: int) -> None:
        """In the stream's order. Memory freed by one pass is taken by the next of the same stream, and by no other.

        So a recorded graph, launched again, writes where it wrote before, and nobody else has that memory meanwhile.
        The plain pass before has filled the pool: cudaMalloc, forbidden while recording, is not called.
        """
        if self._engine.network.device == "cuda":
            with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                work()
            return
        if self._kept is None:
            self._kept = HostFunction(lambda _: work())
        # Not through the bindings: those of 12.9 free what a recorded host function needs as soon as it ran once.
        assert ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc(ctypes.c_void_p(stream), self._kept, None) == 0


class SameLogits:
    """The processor's loop on the logits of the same network, each canvas alone: what the backend's texts must be."""

    lanes = 1

    def __init__(self, network: Network, k: int) -> None:
        self._network, self._k = network, k

    def score(self, canvas: Ids, t: float, positions: Positions, rows: int = 1) -> StepResult:
        network = self._network
        times = torch.tensor([t], device=network.device) if network.timed else None
        logits = network(torch.from_numpy(canvas[None]).to(network.device), times)
        return reduce_logits(logits[0].cpu().numpy()[positions], self._k)

    def close(self) -> None:
        """Nothing to free."""
