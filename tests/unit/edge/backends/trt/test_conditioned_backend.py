"""Blocks with words and pictures on the emulated GPU, ONNX Runtime in the engines' place, write the CPU loop's texts.

Both score with the same half-precision graphs, so a text may differ only where a draw is closer than FP16 can tell.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch

from edge import doctor
from edge.backends.trt import backend as trt_backend
from edge.backends.trt.conditioned_blocks import TrtConditionedBlocks
from edge.backends.trt.driver import CudaMemory, Gpu
from edge.backends.trt.engine_builder import Order, fulfil
from edge.backends.trt.engine_cache import Built, built_roles
from edge.backends.trt.profiles import PAIRED, step_profiles
from edge.decoding.blocks import BlocksLoop, Law, RowScores, Slot, TakesConditions, Writing, advance
from edge.decoding.conditions import Condition, Remaining
from edge.decoding.types import Floats, Ids
from edge.serving.loaded_bundle import LoadedBundle
from host.evaluate.cuda_rows import CudaRows
from host.export.blocks_pipeline import blocks_graphs
from host.export.bundle_writer import BundleGraph, write_bundle
from host.export.conditions_pipeline import conditioned_graphs, conditions_spec
from host.export.cuda_memory import cuda_encode_image_graph, cuda_encode_text_graph
from host.export.cuda_step import cuda_step_graph
from host.export.random_weights import untrained
from host.export.shared_weights import with_shared_weights
from host.model import conditions as host_conditions
from host.model.network import CONFIGS, Denoiser
from shared.errors import BundleError, DeviceError
from shared.manifest import Manifest, Role, find_graph, graph_bytes, read_manifest
from shared.messages import GenerateRequest
from shared.tokens import EOS, MASK
from tests.support.decided import decided_network
from tests.support.emulator import Emulator
from tests.support.emulator.builder import BuildingTensorRT
from tests.support.emulator.fake_tensorrt import FakeTensorRT
from tests.support.emulator.fakes import FakeDriver
from tests.support.kept_rows import keep
from tests.support.picture_files import picture
from tests.unit.edge.backends.trt.test_backend import ALLOCATES, SYNCHRONISES
from tests.unit.edge.backends.trt.test_blocks_backend import (
    DEPTH,
    GAPS,
    LAWS,
    LENGTH,
    PROMPTS,
    VOCAB,
    Parts,
    finish,
    writing_of,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(500),
    pytest.mark.proof("4. the TensorRT backend over a recording driver, and below NVIDIA's own bindings"),
]

ROLES: tuple[Role, ...] = ("step", "encode.text", "encode.image")
PIXELS = np.random.default_rng(2).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
TOP_K = 64


def condition_of(words: Sequence[tuple[int, ...]], pictures: int, guidance: float) -> Condition:
    return Condition(tuple(words), PIXELS[:pictures], guidance)


WORDS = condition_of([(9, 10), (11,)], 0, 0.0)
BOTH = condition_of([(20,)], 2, 0.0)
GUIDED = condition_of([(9, 10), (11,)], 1, 1.5)


def speaking_network() -> Denoiser:
    """Whose conditions change what it writes."""
    torch.manual_seed(3)
    model = decided_network(VOCAB, LENGTH, depth=DEPTH)
    shape = replace(model.config, conditions=True)
    made = Denoiser(shape).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    made.load_state_dict(model.state_dict(), strict=False)
    assert made.drafter is not None
    made.drafter.likely = torch.arange(EOS, 300)
    return made


@dataclass
class Bench:
    """A backend, the fakes below it, and its bundle."""

    driver: FakeDriver
    trt: Any
    manifest: Manifest
    graphs: list[bytes]

    def open(self) -> TrtConditionedBlocks:
        gpu = Gpu(self.driver)  # type: ignore[arg-type]
        step = next(graph for graph in self.manifest.graphs if graph.role == "step")
        return TrtConditionedBlocks(
            self.trt,
            gpu,
            memory=CudaMemory(gpu),
            manifest=self.manifest,
            step=step,
            graph=self.graphs[0],
            built=[Built(graph, b"cubin") for graph in self.graphs],
        )


def export_conditions(folder: Path, *, on_cpu: bool) -> Denoiser:
    """A bundle with blocks that take conditions for CUDA; on_cpu: for the CPU, too."""
    model = speaking_network()
    _, progress, tokenizer = untrained(replace(CONFIGS["debug"], canvas_len=LENGTH))
    makes = (cuda_step_graph, cuda_encode_text_graph, cuda_encode_image_graph)
    graphs = [BundleGraph(make(model), role, "fp16", "cuda") for make, role in zip(makes, ROLES, strict=True)]
    if on_cpu:
        graphs += [*blocks_graphs(model, {"ar"}), *conditioned_graphs(model, {"ar"})]
    with tokenizer as path:
        write_bundle(
            folder,
            model,
            progress=progress,
            tokenizer=path,
            graphs=with_shared_weights(graphs),
            top_k=TOP_K,
            conditions=conditions_spec(),
        )
    return model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "conditions"
    export_conditions(folder, on_cpu=False)
    return folder


@pytest.fixture
def bench(emulator: Emulator, bundle: Path) -> Iterator[Bench]:
    manifest, driver = read_manifest(bundle), FakeDriver(emulator)
    graphs = [graph_bytes(bundle, manifest, find_graph(bundle, manifest, "cuda", role)) for role in ROLES]
    trt = FakeTensorRT(driver, step_profiles(LENGTH, DEPTH, paired=True))
    yield Bench(driver, trt, manifest, graphs)
    assert {name: left for name, left in driver.live.items() if left} == {}, "something was made and never freed"
    assert trt.nothing_lives()


class OnCpu:
    """The CPU's loop over the very graphs that the GPU runs: the law in numpy, without drafts."""

    depth, lanes, fills_gaps, fills_conditioned_gaps = 0, 1, True, True

    def __init__(self, graphs: Sequence[bytes]) -> None:
        step, text, image = map(onnx.load_from_string, graphs)
        self._step, self._encoders = step, {"encode.text": text, "encode.image": image}

    def load(self, condition: Condition) -> None:
        """Nothing."""

    def open_slot(self) -> Slot:
        return Slot(np.zeros(2 * LENGTH, np.int32), [(CudaRows(self._step, self._encoders), list[Any]())])

    def encode(self, slot: Slot, condition: Condition) -> None:
        (one,) = slot.memory
        scaled = torch.from_numpy(condition.pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))
        one[0].remember(host_conditions.Condition(condition.words, scaled))
        slot.condition = condition.guidance
        if condition.guidance:
            slot.memory.append((CudaRows(self._step, self._encoders), list[Any]()))

    def narrow(self, slot: Slot, remaining: Remaining) -> None:
        reads = slot.memory[0][0].given["reads"][0]
        if remaining.nothing:
            reads[:] = np.arange(reads.size) == reads.size - 1
            del slot.memory[1:]
        else:
            reads[: remaining.hidden.size][remaining.hidden] = 0

    def prefill(self, slot: Slot, tokens: Ids, positions: Ids) -> None:
        self.rows(slot, tokens, positions=positions, scored=1, sees=tokens.size)
        slot.cached = tokens.size

    def rows(
        self, slot: Slot, tokens: Ids, *, positions: Ids, scored: int, under_way: int = 1, sees: int = 0
    ) -> RowScores:
        n, places, all_logits = tokens.size, positions[None].astype(np.int32), []
        seen = np.full((1, n), sees, np.int32) if sees else np.arange(1, n + 1, dtype=np.int32)[None]
        for graph, last in slot.memory:
            if last:
                made, before_places, before = last.pop()
                keep(graph, made, before_places, [slot.cached - before])
            made = graph.run(tokens[None], places, sees=seen, scored=np.arange(n - scored, n, dtype=np.int32)[None])
            last.append((made, places, slot.cached))
            all_logits.append(made["logits"][0].astype(np.float32))
        logits = all_logits[0]
        if len(all_logits) == 2:
            least = np.sort(logits, 1)[:, -TOP_K][:, None]
            changed = logits + np.float32(slot.condition) * (logits - all_logits[1])
            logits = np.where(logits >= least, changed, np.float32(-1e4)).astype(np.float16).astype(np.float32)
        return RowScores(logits, logits)

    def draft(self, slot: Slot, state: Floats, *, token: int, noise: Floats, law: Law) -> Ids:
        raise AssertionError("it drafts nothing")

    def close(self) -> None:
        """Nothing to free."""


def written(
    backend: TrtConditionedBlocks, slot: Slot, asked: tuple[Parts, bool], law: Law, condition: Condition | None
) -> Writing:
    writing = writing_of(*asked, law)
    writing.slot, slot.cached, writing.condition = slot, 0, condition
    finish(backend, [writing])
    assert MASK not in writing.canvas[writing.fill]
    return writing


def on_cpu(graphs: Sequence[bytes], asked: tuple[Parts, bool], law: Law, condition: Condition | None) -> Writing:
    cpu, writing = OnCpu(graphs), writing_of(*asked, replace(law, window=0))
    writing.slot, writing.condition = cpu.open_slot(), condition
    while not writing.done:
        advance(cpu, writing)
    return writing


@pytest.mark.parametrize("condition", [None, WORDS, BOTH, GUIDED], ids=["none", "words", "both", "guided"])
def test_conditions_on_gpu_write_the_texts_of_the_cpu(bench: Bench, condition: Condition | None) -> None:
    """Prompts and gaps, one after another in one slot, in which a request with another condition was before."""
    backend = bench.open()
    slot = backend.open_slot()
    written(backend, slot, PROMPTS[0], LAWS[0], BOTH if condition is WORDS else WORDS)
    agreed, moved, asked = 0, 0, [PROMPTS[0], PROMPTS[2], GAPS[0]]
    for one, law in zip(asked, (LAWS[0], LAWS[1], LAWS[3]), strict=True):
        found, wanted = written(backend, slot, one, law, condition), on_cpu(bench.graphs, one, law, condition)
        agreed += bool((found.canvas == wanted.canvas).all())
        moved += condition is None or bool((found.canvas != written(backend, slot, one, law, None).canvas).any())
    backend.close()
    assert agreed >= len(asked) - 1, "more than one draw was too close to call"
    assert moved >= len(asked) - 1, "the condition changes nothing"


def test_conditions_on_gpu_share_passes_with_plain_requests(bench: Bench) -> None:
    """Each ends as if it had been by itself."""
    backend = bench.open()
    assert isinstance(backend, BlocksLoop) and isinstance(backend, TakesConditions)
    slots = [backend.open_slot() for _ in range(4)]
    asked = [(PROMPTS[1], None), (PROMPTS[1], WORDS), (PROMPTS[2], GUIDED), (GAPS[1], GUIDED)]
    laws, together = [replace(LAWS[0], seed=100 + i) for i in range(4)], list[Writing]()
    for (one, condition), law, slot in zip(asked, laws, slots, strict=True):
        together.append(writing_of(*one, law))
        together[-1].slot, together[-1].condition = slot, condition
        backend.advance([together[-1]])
    while open_ones := [w for w in together if not w.done]:
        backend.advance(open_ones)
    for (one, condition), law, found in zip(asked, laws, together, strict=True):
        np.testing.assert_array_equal(found.canvas, written(backend, slots[0], one, law, condition).canvas)
    backend.close()


def test_conditions_on_gpu_encode_once_and_allocate_nothing(bench: Bench) -> None:
    backend = bench.open()
    assert bench.driver.calls.count("cuGraphInstantiate") == len(PAIRED) + 2 + 2
    writing = writing_of(*PROMPTS[1], LAWS[0])
    writing.slot, writing.condition = backend.open_slot(), BOTH
    bench.driver.calls.clear()
    finish(backend, [writing])
    assert bench.driver.calls.count("cuGraphLaunch") == writing.passes + 2, "words and pictures, once"
    assert not any(ALLOCATES.fullmatch(name) or SYNCHRONISES.fullmatch(name) for name in bench.driver.calls)
    backend.close()


def test_conditions_on_gpu_scores_that_are_no_numbers_fail_before_anything_is_kept(bench: Bench) -> None:
    """Tried again, the request is what it would have been: its condition is encoded anew."""
    backend = bench.open()
    slots = [backend.open_slot() for _ in range(2)]
    mine, twin = (writing_of(*PROMPTS[0], LAWS[0]) for _ in range(2))
    for writing, slot in zip((mine, twin), slots, strict=True):
        writing.slot, writing.condition = slot, GUIDED
    backend._remember(mine)
    backend._writings[0:1]["broken"] = 1
    backend._placed[0] = mine
    backend._begin_gap(mine)
    with pytest.raises(DeviceError, match="scores are not all numbers"):
        backend.advance([mine])
    finish(backend, [mine, twin])
    np.testing.assert_array_equal(mine.canvas, twin.canvas)
    backend.close()


def test_conditions_on_gpu_without_room_for_them_are_refused_and_the_device_is_left(bench: Bench) -> None:
    """`bench` asks whether its context is released."""
    takes = bench.manifest.conditions
    assert takes is not None
    more = msgspec.structs.replace(takes, words=10)
    bench.manifest = msgspec.structs.replace(bench.manifest, conditions=more)
    with pytest.raises(BundleError, match=r"step\.cuda\.fp16\.onnx has no room for the words and pictures"):
        bench.open()


def test_bundle_of_conditions_is_built_found_and_served(
    bench: Bench, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three engines, which the doctor names; without one of them the GPU serves no blocks."""
    tensorrt = BuildingTensorRT(bench.driver, bench.trt.shapes)
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr("edge.backends.trt.kernels.compile_kernels", lambda architecture: b"cubin")
    for module in (trt_backend, doctor):
        monkeypatch.setattr(module, "Gpu", lambda: Gpu(bench.driver))  # type: ignore[arg-type]
        monkeypatch.setattr(module, "import_tensorrt", lambda: tensorrt)
    assert built_roles(bench.manifest) == list(ROLES)
    for role in ROLES:
        with pytest.raises(trt_backend.NoEngine):
            LoadedBundle.load(bundle, "trt")
        gpu, order = Gpu(bench.driver), Order(str(bundle), str(tmp_path), 256, force=False, role=role)  # type: ignore[arg-type]
        fulfil(order, tensorrt, gpu, bench.manifest)  # type: ignore[arg-type]
        gpu.close()
    found, profiles = doctor.gpu_and_engine(bundle, bench.manifest)
    assert [one.name for one in found][-3:] == ["engine of blocks", "engine of words", "engine of pictures"]
    assert not any(one.fix for one in found) and profiles["step"] == step_profiles(LENGTH, DEPTH, paired=True)
    loaded = LoadedBundle.load(bundle, "trt")
    assert (loaded.limits(1).words, loaded.limits(1).images) == (3, 3)
    request = GenerateRequest(prompt="a", words=["red"], images=[picture(1)], guidance=1.0, max_tokens=6, seed=1)
    texts = {loaded.run(loaded.prepare(one)).text for one in (request, msgspec.structs.replace(request, guidance=0.0))}
    plain = loaded.run(loaded.prepare(GenerateRequest(prompt="a", max_tokens=6, seed=1))).text
    under_way = loaded.begin(loaded.prepare(request))
    assert under_way.ready() and loaded.batches(under_way) == (1,)  # its first pass reads the prompt
    loaded.step([under_way])
    assert loaded.batches(under_way)[-1] > 1  # then it may share passes, with plain requests, too
    while not under_way.done:
        loaded.step([under_way])
    loaded.close()
    assert len(texts | {plain}) == 3
    assert tensorrt.nothing_lives()
