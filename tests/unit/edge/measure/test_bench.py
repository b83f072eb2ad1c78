"""`python -m edge.bench` and the `host.bench step` that it compares with."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edge.measure.bench import Report, parse_clients
from edge.measure.clients import ClientsReport, measure
from host.bench.step import StepSpeed, step_gflop
from host.model.network import ModelConfig
from shared.errors import ConfigError
from shared.schedule import reveal_count


@pytest.mark.slow
def test_bench_json_has_all_that_the_table_has(debug_bundle: Path) -> None:
    options = ["--bundle", str(debug_bundle), "--threads", "1", "--steps", "4", "8", "--json"]
    command = [sys.executable, "-m", "edge.bench", *options]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    report = msgspec.json.decode(done.stdout, type=Report)
    assert report.threads == 1
    canvas = report.canvas
    assert canvas is not None and report.blocks is None
    assert canvas.bare_step_ms is not None
    assert canvas.reduction_ms is not None
    assert canvas.bare_step_ms + canvas.reduction_ms == pytest.approx(canvas.step_ms)
    assert canvas.default_step_ms is not None
    assert min(canvas.bare_step_ms, canvas.reduction_ms, canvas.default_step_ms) > 0
    assert canvas.default_scored == reveal_count(127, 42, 64)  # of 127 masked, in pass 43 of the default 64
    assert report.daemon.start_s > 0 and report.daemon.peak_mb > 20
    assert [g.steps for g in canvas.generations] == [4, 8]
    for g in canvas.generations:
        assert min(g.tokens_per_s, g.first_token_ms, g.last_token_ms, g.loop_ms) > 0
        assert g.first_token_ms < g.last_token_ms
    assert report.reference is not None
    speed = msgspec.convert(report.reference, StepSpeed)
    assert min(speed.torch_ms, speed.gflop, speed.fp32_gflops, speed.int8_gflops) > 0


@pytest.mark.slow
def test_bench_of_a_bundle_that_writes_by_blocks_alone(blocks_alone: Path) -> None:
    command = [sys.executable, "-m", "edge.bench", "--bundle", str(blocks_alone), "--threads", "1", "--json"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    report = msgspec.json.decode(done.stdout, type=Report)
    assert report.canvas is None and report.blocks is not None
    assert [text.window for text in report.blocks.texts] == [0, 1, 3]
    assert all(text.tokens_per_s > 0 for text in report.blocks.texts)


def test_bench_work_of_a_step_by_hand() -> None:
    """Two layers of width 2 on 4 positions with 5 words; every weight multiplies and adds once a position.

    Two positions are masked; from the second attention's queries on only they are computed.
    """
    q, kv, others = 2 * 2, 2 * 4, 2 * 2 + 2 * 8 + 8 * 2
    linear = 2 * (4 * (q + kv + others) + 4 * kv + 2 * (q + others))
    attention = 2 * 2 * (4 * 4 * 2) + 2 * 2 * (2 * 4 * 2)
    head = 2 * 2 * 2 * 5
    config = ModelConfig("hand", d_model=2, layers=2, heads=1, vocab_size=5, canvas_len=4)
    assert step_gflop(config) == pytest.approx((linear + attention + head) / 1e9)


def test_bench_impossible_shape_is_one_sentence() -> None:
    """A width of 64 does not divide into 3 heads."""
    command = [sys.executable, "-m", "host.bench", "step", "64", "2", "3", "512", "256"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 78
    assert done.stderr.decode().startswith("error: no network has the shape")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        (["--bundle", "nowhere"], 66, "error: nowhere is not a bundle"),
        (["--steps", "8", "0"], 78, "error: --steps takes numbers from 1 to 1024"),
        (["--threads", "0"], 78, "error: --threads must be at least 1"),
    ],
)
def test_bench_bad_flag_is_one_sentence(options: list[str], status: int, sentence: str) -> None:
    done = subprocess.run([sys.executable, "-m", "edge.bench", *options], capture_output=True, check=False)
    assert done.returncode == status
    assert done.stderr.decode().startswith(sentence)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("decode", ["blocks", "canvas"])
def test_clients_share_the_same_requests(blocks_bundle: Path, decode: str) -> None:
    options = ["--bundle", str(blocks_bundle), "--threads", "1", "--clients", "1,3", "--decode", decode, "--json"]
    done = subprocess.run([sys.executable, "-m", "edge.bench", *options], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    report = msgspec.json.decode(done.stdout, type=ClientsReport)
    assert report.decode == decode
    assert [(row.length, row.clients) for row in report.loads] == [(64, 1), (64, 3), (256, 1), (256, 3)]
    for row in report.loads:
        assert row.tokens_per_s > 0 and 0 < row.p50_ms <= row.p99_ms
    assert [crowd.active for crowd in report.crowds] == [1, 3]
    for crowd in report.crowds:
        assert min(crowd.short_ms, crowd.fair_ms) > 0 and 0 < crowd.health_p50_ms <= crowd.health_p99_ms
    assert 10 < report.peak_mb < 1000


def test_clients_of_a_decoder_that_the_bundle_has_not_are_refused(debug_bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"--decode blocks: .* decodes by canvas alone"):
        measure(debug_bundle, backend="ort", threads=1, clients=[1], decode="blocks")


@pytest.mark.parametrize("clients", ["", "0", "1,,2", "99", "many"])
def test_impossible_clients_are_one_sentence(clients: str) -> None:
    with pytest.raises(ConfigError, match="--clients takes numbers from 1 to 24"):
        parse_clients(clients)
