"""Fixtures shared by all tests: a real bundle of the debug configuration, untrained."""

import os
import shutil
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import hypothesis
import msgspec
import pytest
import torch
from msgspec.structs import replace

from edge import native
from host.export.__main__ import export_untrained
from host.export.bundle_writer import BundleGraph, write_bundle
from host.export.cpu_graph import cpu_graph
from host.export.cpu_int8 import quantize
from host.export.cuda_graph import cuda_graph
from host.export.pipeline import Wanted
from host.export.random_weights import untrained
from host.model.network import Denoiser, config_named
from host.sampling.reference import TOP_K
from shared.manifest import MANIFEST, SamplingDefaults, read_manifest
from tests.support.emulator import Emulator, build

torch.set_num_threads(1)  # debug networks are too small to share, and tests run in parallel

# A suite run in the background may be told to ignore these, and its children would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# No deadline: a busy machine is no failure. No database: a test leaves nothing behind. Same commit, same examples.
hypothesis.settings.register_profile("suite", database=None, deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


@dataclass(frozen=True)
class Exported:
    """An untrained network and the bundle made from it."""

    model: Denoiser
    folder: Path


def _export(folder: Path, int8: bool) -> Exported:
    model, progress, tokenizer = untrained(config_named("debug"))
    graph = cpu_graph(model, TOP_K)
    shipped = (
        BundleGraph(quantize(graph, "dynamic", []), "canvas", "int8", "cpu")
        if int8
        else BundleGraph(graph, "canvas", "fp32", "cpu"),
        BundleGraph(cuda_graph(model), "canvas", "fp16", "cuda"),
    )
    with tokenizer as path:
        write_bundle(folder, model, progress=progress, tokenizer=path, graphs=shipped, top_k=TOP_K)
    return Exported(model, folder)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """FP32 CPU graph and FP16 CUDA graph."""
    return _export(tmp_path_factory.mktemp("bundles") / "debug", int8=False)


@pytest.fixture(scope="session")
def exported_int8(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """INT8 CPU graph and FP16 CUDA graph, of the same network."""
    return _export(tmp_path_factory.mktemp("bundles") / "debug-int8", int8=True)


@pytest.fixture(scope="session")
def blocks_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every graph for the CPU, blocks first."""
    folder = tmp_path_factory.mktemp("bundles") / "blocks"
    export_untrained("debug", folder, wanted=Wanted(cpu_fp32=True), defaults=SamplingDefaults())
    return folder


@pytest.fixture(scope="session")
def int8_blocks_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in INT8."""
    folder = tmp_path_factory.mktemp("bundles") / "int8"
    export_untrained("debug", folder, wanted=Wanted(cpu_int8=True), defaults=SamplingDefaults())
    return folder


@pytest.fixture(scope="session")
def conditioned_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, and the graphs of words and pictures."""
    folder = tmp_path_factory.mktemp("bundles") / "conditioned"
    export_untrained("debug", folder, wanted=Wanted(cpu_fp32=True), defaults=SamplingDefaults(), conditions=True)
    return folder


@pytest.fixture(scope="session")
def blocks_alone(blocks_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a canvas."""
    folder = tmp_path_factory.mktemp("bundles") / "blocks-alone"
    manifest = read_manifest(blocks_bundle)
    graphs = tuple(graph for graph in manifest.graphs if graph.role != "canvas")
    shutil.copytree(blocks_bundle, folder, ignore=shutil.ignore_patterns("canvas.*"))
    content = msgspec.json.encode(replace(manifest, decoders=("blocks",), graphs=graphs))
    (folder / MANIFEST).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def debug_bundle(exported: Exported) -> Path:
    """A folder that any edge can load."""
    return exported.folder


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The device's kernels on this processor, 64 threads a block."""
    return build(tmp_path_factory.mktemp("emulator"), threads=64)


STILL_NEEDS_A_DEVICE: Final = (
    "the unit's sandbox and cuInit: which device nodes and system calls CUDA asks for, and whether it does without "
    "memory that is writable and executable",
    "building two engines, with conditions four: minutes and memory for nine profiles of canvas and five of blocks on "
    "8 GB",
    "fourteen execution contexts, with conditions seventeen, and their CUDA graphs beside each other in that memory",
    "the state of stream and context after a capture that failed: whether the plain launches that follow work",
    "whether attention with the graph's bias still meets TensorRT's fused kernel, and so what a step costs",
)
"""What no machine without an Orin can prove, in the order in which a first device will probably fail."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a busy machine a slow test may take longer than the usual limit."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600))


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Keep the name of the proof that a test belongs to; user properties travel from xdist's workers too."""
    for mark in item.iter_markers("proof"):
        if call.when == "setup":
            item.user_properties.append(("proof", mark.args[0]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tally of what was proved about the GPU path, and on a booted systemd: tests run, skipped and why; and which
    compiled library was tested."""
    found = native.library()
    terminalreporter.section("the compiled library")
    terminalreporter.line(native.why_not() if found is None else found.instructions)
    if log := os.environ.get("BOOTED_SYSTEMD"):
        terminalreporter.section("the service on a booted systemd")
        *lines, tally_of_systemd = Path(log).read_text().splitlines() or [""]
        skipped = [line for line in lines if line.startswith("SKIPPED")]
        terminalreporter.line("\n".join([tally_of_systemd.strip("= "), *skipped]))
    tally: dict[str, Counter[str]] = {}
    reasons: dict[str, set[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for proof in {value for name, value in getattr(report, "user_properties", ()) if name == "proof"}:
                tally.setdefault(str(proof), Counter())[outcome] += 1
                if outcome == "skipped":
                    reasons.setdefault(str(proof), set()).add(report.longrepr[2].removeprefix("Skipped: "))
    if not tally:
        return
    terminalreporter.section("proofs about the GPU path")
    if absent := [str(number) for number in range(1, 8) if not any(proof.startswith(f"{number}.") for proof in tally)]:
        terminalreporter.line(f"not in this run: {', '.join(absent)}")
    for proof, counts in sorted(tally.items()):
        why = f" ({'; '.join(sorted(reasons[proof]))})" if proof in reasons else ""
        terminalreporter.line(f"{proof}: {', '.join(f'{n} {outcome}' for outcome, n in counts.items())}{why}")
    terminalreporter.line("still needs a device, in the order in which a first one will probably fail:")
    for number, what in enumerate(STILL_NEEDS_A_DEVICE, 1):
        terminalreporter.line(f"  {number}. {what}")
