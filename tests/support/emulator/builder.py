"""The half of the fake TensorRT that builds: its engine is the graph it was given."""

from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import onnx

from tests.support.emulator.fake_tensorrt import FakeTensorRT
from tests.support.emulator.fakes import FakeDriver

HEADER = b"timings:"


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        assert min == opt == max
        self.shapes[input] = opt


class Cache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content


class Config:
    progress_monitor: Any = None

    def __init__(self) -> None:
        self.profiles: list[Profile] = []
        self.workspace = 0
        self.cache: Cache | None = None

    def set_memory_pool_limit(self, pool: str, pool_size: int) -> None:
        assert pool == "workspace"
        self.workspace = pool_size

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Cache | None:
        fits = not serialized_timing_cache or serialized_timing_cache.startswith(HEADER)
        return Cache(serialized_timing_cache) if fits else None

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert isinstance(cache, Cache) and not ignore_mismatch
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache | None:
        return self.cache

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class BuildingTensorRT(FakeTensorRT):
    """Also parses and builds. says: what the builder logs as an error, and builds nothing."""

    NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1})
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")

    class IProgressMonitor:
        def __init__(self, _: object = None) -> None:
            pass

    def __init__(self, driver: FakeDriver, shapes: list[tuple[int, int]]) -> None:
        super().__init__(driver, shapes)
        self.configs: list[Config] = []
        self.timings_before: list[bytes] = []
        self.says: str | None = None
        outer = self

        class Builder:
            def __init__(self, logger: Any) -> None:
                self._logger = logger

            def create_network(self, flags: int) -> Any:
                assert flags == 1 << int(outer.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
                return SimpleNamespace()

            def create_builder_config(self) -> Config:
                outer.configs.append(Config())
                return outer.configs[-1]

            def create_optimization_profile(self) -> Profile:
                return Profile()

            def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
                assert config.cache is not None
                if outer.says is not None:
                    self._logger.log(outer.ILogger.Severity.ERROR, outer.says)
                    return None
                outer.timings_before.append(config.cache.content)
                config.cache.content = (config.cache.content or HEADER) + b"one more."
                config.progress_monitor.phase_start("tactics", None, 2)
                assert config.progress_monitor.step_complete("tactics", 0)
                config.progress_monitor.phase_finish("tactics")
                return bytes(network.graph)

        class OnnxParser:
            def __init__(self, network: Any, logger: Any) -> None:
                self._network = network
                self.num_errors = 0

            def parse(self, model: bytes) -> bool:
                inputs = onnx.load_from_string(model).graph.input
                tensors = [
                    SimpleNamespace(name=i.name, shape=tuple(d.dim_value or -1 for d in i.type.tensor_type.shape.dim))
                    for i in inputs
                ]
                self._network.graph, self._network.num_inputs = model, len(tensors)
                self._network.get_input = tensors.__getitem__
                return True

        self.Builder, self.OnnxParser = Builder, OnnxParser
