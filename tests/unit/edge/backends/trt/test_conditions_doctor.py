"""The doctor of a board whose engines read conditions: the real backend over the recording driver, against the CPU."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge import doctor
from edge.backends.ort_rows import OrtRows
from edge.backends.trt import backend as trt_backend
from edge.backends.trt import conditioned_blocks
from edge.backends.trt.block_pass import Pass
from edge.backends.trt.captured import Program
from edge.backends.trt.conditioned_blocks import TrtConditionedBlocks
from edge.backends.trt.driver import Gpu
from edge.backends.trt.engine_builder import Order, fulfil
from edge.backends.trt.profiles import step_profiles
from edge.decoding.blocks import Writing
from edge.measure.blocks import ROWS, pass_costs
from edge.measure.self_test import KINDS
from shared.errors import DeviceError
from shared.manifest import read_manifest
from tests.support.emulator import Emulator
from tests.support.emulator.builder import BuildingTensorRT
from tests.support.emulator.fakes import FakeDriver
from tests.unit.edge.backends.trt.test_blocks_backend import DEPTH, LENGTH
from tests.unit.edge.backends.trt.test_conditioned_backend import ROLES, export_conditions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.proof("4. the TensorRT backend over a recording driver, and below NVIDIA's own bindings"),
]

PROFILES = step_profiles(LENGTH, DEPTH, paired=True)
EVERYWHERE = ((1, 4), (4, 4), (8, 4), (1, 16), (1, 64))
"""Requests and rows of what is compared: a plain one has a pass of one slot to itself, a guided one of two."""
Report = Callable[[], tuple[int, dict[str, int], str | None]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "conditions"
    export_conditions(folder, on_cpu=True)
    return folder


@pytest.fixture
def report(
    emulator: Emulator,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Report:
    """Exit code, percent of the tokens of each comparison, the first thing to fix. All engines are built."""
    driver, manifest = FakeDriver(emulator), read_manifest(bundle)
    tensorrt = BuildingTensorRT(driver, PROFILES)
    monkeypatch.setattr("edge.config.CONFIG", tmp_path / "none.toml")
    monkeypatch.setattr("edge.measure.self_test.TEXTS", 2)
    for name, value in (("CACHE_DIRECTORY", ""), ("EDGELM_SOCKET", "socket"), ("EDGELM_STATE", "state")):
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setattr("edge.backends.trt.kernels.compile_kernels", lambda architecture: b"cubin")
    for module in (trt_backend, doctor):
        monkeypatch.setattr(module, "Gpu", lambda: Gpu(driver))  # type: ignore[arg-type]
        monkeypatch.setattr(module, "import_tensorrt", lambda: tensorrt)
    for role in ROLES:
        gpu = Gpu(driver)  # type: ignore[arg-type]
        fulfil(Order(str(bundle), str(tmp_path), 256, force=False, role=role), tensorrt, gpu, manifest)  # type: ignore[arg-type]
        gpu.close()
    capsys.readouterr()

    def examine() -> tuple[int, dict[str, int], str | None]:
        code = doctor.main(["--bundle", str(bundle), "--json"])
        told: dict[str, Any] = json.loads(capsys.readouterr().out)
        compared = {
            line["name"].removesuffix(" on the gpu"): int(line["value"].partition(" ms, ")[2].partition("%")[0])
            for line in told["findings"]
            if line["name"].endswith(" on the gpu")
        }
        assert not any(driver.live.values()) and tensorrt.nothing_lives(), "something was made and never freed"
        return code, compared, told["fix_first"]

    return examine


def names(requests: int, rows: int, kinds: Sequence[str] = KINDS) -> set[str]:
    return {f"{requests} × {rows} rows" + (f" with {kind}" if kind else "") for kind in kinds}


def test_doctor_runs_every_profile_with_and_without_conditions(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guided request takes two slots: by itself it has a profile of its own."""
    ran, run = Counter[str](), TrtConditionedBlocks._run

    def counted(backend: TrtConditionedBlocks, program: Program) -> None:
        ran[program.name] += 1
        run(backend, program)

    monkeypatch.setattr(TrtConditionedBlocks, "_run", counted)
    code, compared, fix = report()
    assert (code, fix) == (0, None)
    assert compared.keys() == set().union(*(names(*shape) for shape in EVERYWHERE))
    assert min(compared.values()) >= 90
    assert ran.keys() == {f"{slots} × {rows} rows" for slots, rows in PROFILES} | {"words", "pictures"}


def black_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine of pictures gets."""
    monkeypatch.setattr(
        conditioned_blocks, "as_input", lambda pixels: np.zeros(pixels.shape, np.float16).swapaxes(1, 3)
    )


def no_guidance_in_two_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the pass that a guided request has to itself."""
    guide = TrtConditionedBlocks._change_scores

    def not_in_two(backend: TrtConditionedBlocks, program: Pass) -> None:
        if program.requests != 2:
            guide(backend, program)

    monkeypatch.setattr(TrtConditionedBlocks, "_change_scores", not_in_two)


def no_memory_in_the_upper_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the largest profile read the memory of other slots."""
    remember = TrtConditionedBlocks._remember

    def forgets(backend: TrtConditionedBlocks, w: Writing) -> None:
        remember(backend, w)
        backend._reads[8:] = backend._empty

    monkeypatch.setattr(TrtConditionedBlocks, "_remember", forgets)


Fault = Callable[[pytest.MonkeyPatch], None]
FAULTS: list[tuple[Fault, set[str], set[str]]] = [
    (
        black_pictures,
        set().union(*(names(*shape, ["pictures"]) for shape in EVERYWHERE)),
        set().union(*(names(*shape, ["guidance"]) for shape in EVERYWHERE)),
    ),
    (
        no_guidance_in_two_slots,
        names(1, 4, ["guidance"]),
        set().union(*(names(*shape, ["guidance"]) for shape in EVERYWHERE)),
    ),
    (no_memory_in_the_upper_slots, names(8, 4, ["words", "pictures", "guidance"]), set()),
]
"""What is broken; the comparisons that fail for it, and those that may."""


@pytest.mark.parametrize(("fault", "fail", "may_fail"), FAULTS, ids=[one[0].__name__ for one in FAULTS])
def test_doctor_names_what_disagrees_with_the_cpu_and_nothing_else(
    report: Report, monkeypatch: pytest.MonkeyPatch, fault: Fault, fail: set[str], may_fail: set[str]
) -> None:
    fault(monkeypatch)
    code, compared, fix = report()
    print(compared)
    failed = {name for name, percent in compared.items() if percent < 80}
    assert fail <= failed <= fail | may_fail
    first = next(name for name in compared if name in failed)
    assert (code, fix) == (
        DeviceError.exit_code,
        f"{first} on the gpu disagrees with the CPU: python -m edge.build --force",
    )


def test_bench_and_doctor_measure_passes_of_a_short_canvas(bundle: Path) -> None:
    rows = OrtRows(bundle, read_manifest(bundle), 1)
    assert [one.rows for one in pass_costs(rows, LENGTH)] == list(ROWS)
    rows.close()
