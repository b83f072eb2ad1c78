"""`python -m host.bench`: our loop beside a textbook's, and how much work a token is."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from host import bench
from host.batches import make_batch
from host.loss import WeightedLoss
from host.model import Denoiser, ModelConfig
from host.shards import load_data
from host.textbook import Textbook
from host.train_speed import batch_gflop
from tests.commands import call, refusal


def test_it_prints_both_loops_the_ratio_and_the_peaks(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(bench.main, *("--config", "debug", "--data", data, "--steps", 2, "--batch-size", 8, "--threads", 1))
    head, row, source = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "config" and "of bf16 peak" in head
    name, threads, ours, textbook, ratio, gflops, bf16_peak, fp32_peak, part = (
        row.replace(",", "").replace("%", "").split()
    )
    assert (name, threads) == ("debug", "1")
    assert float(ratio) == pytest.approx(float(ours) / float(textbook), rel=0.01)
    assert float(part) / 100 == pytest.approx(float(gflops) / float(bf16_peak), abs=0.03)
    assert float(fp32_peak) > 0
    assert source == "real tokens of stories.jsonl, vocabulary 300; medians of 2 steps, in turn"


def test_the_textbook_has_our_number_of_parameters_but_for_the_bias_by_distance() -> None:
    shape = ModelConfig("test", d_model=64, layers=2, heads=2, vocab_size=300)
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in (Denoiser(shape), Textbook(shape)))
    assert theirs == ours - shape.heads * (2 * shape.canvas_len - 1)


def test_the_work_of_a_batch_is_what_its_matrix_products_do(data: Path) -> None:
    """Rows one by one have no padding, so that torch's own count of operations must agree, but for the last queries."""
    shape = ModelConfig("test", d_model=64, layers=2, heads=2, vocab_size=300, time_input=False)
    model = Denoiser(shape)
    batch = make_batch(load_data(data).train, 0, 0, 4, 1, "diffusion", "linear")
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        for part in batch.parts:
            WeightedLoss(model, fused=True)(part).backward()
    assert 0.9 < batch_gflop(shape, batch) * 1e9 / counter.get_total_flops() <= 1.01


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--config", "nano"], 78, "unknown configuration 'nano': choose one of debug, tiny"),
        (["--steps", 0], 78, "--steps, --threads, --batch-size and --micro-size must be at least 1"),
        (["--data", "nowhere"], 65, "nowhere holds no prepared data"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: list[object], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, sentence = refusal(capsys, bench.main, *flags)
    assert found == code
    assert words in sentence
