"""`python -m host.bench`: our loop beside the baseline's, and how much work a token is."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from host.bench import __main__ as bench
from host.bench import training as train_speed
from host.bench.peaks import onnxruntime_gflops
from host.bench.training import TrainSpeed, measure_training
from host.data.shards import load_data
from host.device import torch_gflops
from host.experiments.baseline import Baseline
from host.model.network import Denoiser, ModelConfig
from host.train import loss
from host.train import trainer as train
from host.train.batches import make_batch
from host.train.flops import batch_gflop
from host.train.loss import HeadLoss, WeightedLoss
from host.train.objectives import Settings
from tests.support.commands import call, refusal

PEAKS = {torch.float32: 80.0, torch.bfloat16: 240.0}


@pytest.mark.parametrize(
    ("mixed", "products", "names"),
    [
        (None, [torch.float32], "fp32 peak  of fp32 peak"),
        (torch.bfloat16, [torch.bfloat16, torch.float32], "bf16 peak  fp32 peak  of bf16 peak"),
    ],
    ids=["bf16 is emulated", "bf16 is fast"],
)
def test_peak_type_is_that_of_the_loop(
    mixed: torch.dtype | None,
    products: list[torch.dtype],
    names: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where bf16 is emulated the loop runs in float32, and no bf16 product is timed."""
    timed: list[torch.dtype] = []
    speeds: list[TrainSpeed] = []

    def peak(device: torch.device, dtype: torch.dtype) -> float:
        timed.append(dtype)
        return PEAKS[dtype]

    def measure(*arguments: Any, **options: Any) -> TrainSpeed:
        speeds.append(measure_training(*arguments, **options))
        return speeds[-1]

    monkeypatch.setattr(train, "mixed_precision_dtype", lambda *_: mixed)
    monkeypatch.setattr(train_speed, "torch_gflops", peak)
    monkeypatch.setattr(bench, "measure_training", measure)
    flags = ("--steps", 2, "--batch-size", 8, "--threads", 1, "--objectives", "ar=2,infill,canvas")
    call(bench.main, "--config", "debug", "--data", data, *flags)
    (speed,) = speeds
    assert timed == products
    of_peak = speed.tokens_per_s * speed.gflop_per_token / PEAKS[products[0]]
    assert speed.fraction_of_peak == pytest.approx(of_peak, rel=1e-9)
    head, row, source = capsys.readouterr().out.splitlines()
    assert head.endswith(f"  GFLOP/s  {names}")
    assert len(row) == len(head)
    assert source == "real tokens of stories, vocabulary 300; medians of 2 steps, in turn, ours of 8 canvases"


def test_bench_row_is_both_loops_their_ratio_work_and_peaks(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = TrainSpeed("debug", "cpu", 1, 3000.0, 750.0, 0.02, {"bf16": 240.0, "fp32": 80.0})
    monkeypatch.setattr(bench, "measure_training", lambda *_, **__: speed)
    call(bench.main, "--config", "debug", "--data", data, "--objectives", "ar", "canvas")
    head, row, again, _ = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "config"
    figures = ["1", "3,000", "750", "4.00", "60", "240", "80", "25%"]
    assert row.split() == ["debug", "ar", *figures]
    assert again.split() == ["debug", "canvas", *figures]


def test_peaks_of_this_machine_are_measured() -> None:
    assert torch_gflops(torch.device("cpu"), torch.float32, repeats=3) > 1
    assert onnxruntime_gflops("int8", threads=1) > 1


def test_baseline_has_our_parameters_but_for_the_relative_position_bias() -> None:
    shape = ModelConfig("test", d_model=64, layers=2, heads=2, vocab_size=300)
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in (Denoiser(shape), Baseline(shape)))
    assert theirs == ours - shape.heads * (2 * shape.canvas_len - 1)


def test_batch_gflop_is_what_its_matrix_products_do(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows one by one have no padding, so that torch's own count of operations must agree, but for the last queries."""
    shape = ModelConfig("test", d_model=64, layers=2, heads=2, vocab_size=300, time_input=False)
    model = Denoiser(shape)
    monkeypatch.setattr(loss, "SCORED_ALIGNED", 1)
    batch = make_batch(
        load_data(data).train, 0, seed=0, batch_size=4, micro_size=1, mixture={"canvas": 1.0}, settings=Settings()
    )
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        for part in batch.parts:
            WeightedLoss(model, HeadLoss)(part).backward()
    assert 0.9 < batch_gflop(shape, batch) * 1e9 / counter.get_total_flops() <= 1.01


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--config", "nano"], 78, "unknown configuration 'nano': choose one of debug, tiny"),
        (["--steps", 0], 78, "--steps must be a number above 0, not 0"),
        (["--threads", 99999999999], 78, "--threads must be at most 1,024, not 99999999999"),
        (["step", 64, 2, 2, 512, 256, "--threads", 99999999999], 78, "--threads must be at most 1,024, not 9"),
        (["--batch-size", 999999999999], 78, "--batch-size must be at most 65,536, not 999999999999"),
        (["--micro-size", 0], 78, "--micro-size must be a number above 0, not 0"),
        (["--data", "nowhere"], 65, "nowhere holds no prepared data"),
    ],
)
def test_bench_refuses_what_cannot_be_measured(
    flags: list[object], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, sentence = refusal(capsys, bench.main, *flags)
    assert found == code
    assert words in sentence


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        (lambda content: content[:-2], "bytes instead of"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "was altered since it was written"),
    ],
    ids=["truncated", "altered"],
)
def test_bench_refuses_damaged_data(
    damaged: Callable[[bytes], bytes], words: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    shard = tmp_path / "data" / "train-00000.bin"
    shard.write_bytes(damaged(shard.read_bytes()))
    code, sentence = refusal(capsys, bench.main, "--config", "debug", "--data", tmp_path / "data")
    assert code == 65
    assert sentence.startswith(f"{shard} ") and words in sentence
