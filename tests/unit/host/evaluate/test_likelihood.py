"""`python -m host.evaluate`: figures with honest errors, of a run or of the very graph that ships."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from host.evaluate import __main__ as evaluate
from host.evaluate import likelihood
from host.evaluate.likelihood import HeldOut, held_out_files, ratio
from host.evaluate.scorers import TorchScorer
from host.export import __main__ as export
from host.train import trainer as train
from host.train.checkpoint import find_checkpoint, load_model
from shared.manifest import MANIFEST, TOKENIZER, Evaluation
from tests.support.commands import call, refusal, small


def measured(capsys: pytest.CaptureFixture[str], *arguments: object) -> Evaluation:
    """What --json prints: the manifest's own type."""
    capsys.readouterr()
    call(evaluate.main, *arguments, "--json")
    return msgspec.json.decode(capsys.readouterr().out, type=Evaluation)


@pytest.fixture(scope="session")
def bundles(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained run, exported as fp32/ and int8/."""
    folder = tmp_path_factory.mktemp("exports")
    call(export.main, "--run", trained, "--out", folder / "fp32")
    call(export.main, "--run", trained, "--out", folder / "int8", "--int8")
    return folder


def test_evaluate_takes_the_run_s_own_validation_stories(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, "--run", trained)
    assert found.graph == "torch fp32"
    assert found.source == "stories, valid split"
    assert found.stories == 4
    spelled = sum(
        len(f"{n} had a {t}. The {t} was red. {n} was happy.")
        for n, t in [("Tom", "ball"), ("Tom", "dog"), ("Tom", "cake"), ("Tom", "tree")]
    )
    assert abs(found.text_bytes - spelled) <= 8  # names and things are of about one length
    bits = found.nelbo_nats_per_token.value * found.text_tokens / math.log(2) / found.text_bytes
    assert found.bits_per_byte.value == pytest.approx(bits)
    for figure in (found.nelbo_nats_per_token, found.bits_per_byte, found.masked_cross_entropy):
        assert 0 < figure.value < math.log(300)  # it has learned something
        assert 0 < figure.stderr < figure.value


def test_evaluate_again_gives_the_same_figures(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measured(capsys, "--run", trained) == measured(capsys, "--run", trained)


def test_stderr_shrinks_with_draws_and_with_stories(trained: Path, corpus: Path) -> None:
    model, progress = load_model(find_checkpoint(trained))
    held_out = held_out_files(corpus, trained / TOKENIZER, 64)

    def error(stories: int, draws: int) -> float:
        part = HeldOut(held_out.name, held_out.canvases[:stories], held_out.token_bytes)
        return likelihood.evaluate(TorchScorer(model), part, progress.schedule, draws).nelbo_nats_per_token.stderr

    assert error(64, 4) < 0.6 * error(8, 4)  # 8 times the stories: about a third
    assert error(8, 32) < 0.6 * error(8, 4)


def test_stderr_is_that_of_a_ratio() -> None:
    """Against the spread of the figure itself, over many sets of stories and draws."""
    rng = np.random.default_rng(0)

    def once() -> tuple[float, float]:
        length = rng.integers(5, 40, 50)
        per_story = length * rng.normal(2.0, 0.5, 50)
        figure = ratio(per_story + rng.normal(0, 20, (8, 50)), np.broadcast_to(length, (8, 50)))
        return figure.value, figure.stderr

    values, errors = np.array([once() for _ in range(60)]).T
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.35)
    assert np.mean(values) == pytest.approx(2.0, abs=0.05)


def test_evaluate_takes_files_and_a_limit(trained: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(evaluate.main, "--run", trained, "--source", corpus, "--stories", 5, "--draws", 2)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 3
    assert table[0].split("  ")[0] == "graph" and table[0].endswith("masked cross-entropy")
    assert table[1].startswith("torch fp32") and table[1].count("±") == 3
    assert table[2].startswith("on stories: 5 stories, ")


def test_evaluate_of_a_tiny_story_is_finite(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though some draws mask none of its tokens."""
    (tmp_path / "tiny.txt").write_text("Tom")
    found = measured(capsys, "--run", trained, "--source", tmp_path / "tiny.txt")
    assert math.isfinite(found.masked_cross_entropy.stderr)


@pytest.mark.slow
def test_evaluate_of_a_bundle_agrees_with_torch(
    trained: Path, bundles: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ("--source", corpus, "--stories", 12)
    torch_run = measured(capsys, "--run", trained, *source)
    fp32 = measured(capsys, "--bundle", bundles / "fp32", *source)
    int8 = measured(capsys, "--bundle", bundles / "int8", *source)
    assert (fp32.graph, int8.graph) == ("canvas.cpu.fp32.onnx", "canvas.cpu.int8.onnx")
    for name in ("nelbo_nats_per_token", "bits_per_byte", "masked_cross_entropy"):
        reference = getattr(torch_run, name).value
        assert getattr(fp32, name).value == pytest.approx(reference, rel=1e-4)
        assert getattr(int8, name).value == pytest.approx(reference, rel=0.02)
        assert getattr(int8, name).value != getattr(fp32, name).value  # it really is another graph
    assert (fp32.text_tokens, fp32.text_bytes) == (torch_run.text_tokens, torch_run.text_bytes)


def test_evaluate_takes_the_newest_run_by_default(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = measured(capsys, "--run", trained)
    shutil.copytree(trained, tmp_path / "runs" / "only")
    monkeypatch.chdir(tmp_path)
    assert measured(capsys) == expected


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def set_version(path: Path) -> None:
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format_version": 99}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: flip_a_byte(folder / "canvas.cpu.fp32.onnx"),
            "canvas.cpu.fp32.onnx does not match its manifest",
        ),
        (lambda folder: flip_a_byte(folder / TOKENIZER), "tokenizer.json does not match its manifest"),
        (lambda folder: (folder / "canvas.cpu.fp32.onnx").unlink(), "canvas.cpu.fp32.onnx cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json is damaged"),
        (lambda folder: (folder / MANIFEST).unlink(), "is not a bundle"),
        (lambda folder: set_version(folder / MANIFEST), "has format_version 99; this release reads 2"),
    ],
    ids=["graph", "tokenizer", "no graph", "manifest", "no manifest", "version"],
)
def test_evaluate_refuses_a_damaged_bundle(
    bundles: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    words: str,
) -> None:
    shutil.copytree(bundles / "fp32", tmp_path / "damaged")
    damage(tmp_path / "damaged")
    code, sentence = refusal(capsys, evaluate.main, "--bundle", tmp_path / "damaged", "--source", corpus)
    assert code == 66
    assert words in sentence


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 65, "no trained run in runs/: make one with `python -m host.train`, or name one with --run"),
        (["--run", "nowhere"], 65, "nowhere holds no checkpoint"),
        (["--bundle", "nowhere", "--source", "x.txt"], 66, "nowhere is not a bundle: cannot read manifest.json"),
        (["--bundle", "nowhere"], 78, "--bundle needs --source: a bundle carries no text"),
        (["--run", "{trained}", "--draws", 0], 78, "must be a number above 0, not 0"),
        (["--run", "{trained}", "--stories", 0], 78, "must be a number above 0, not 0"),
        (["--run", "{trained}", "--source", "x.txt"], 65, "x.txt does not exist"),
    ],
    ids=["no runs", "no run", "no bundle", "no text", "no draws", "no stories", "no file"],
)
def test_evaluate_refuses_what_cannot_be_measured(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, sentence = refusal(capsys, evaluate.main, *(str(a).format(trained=trained) for a in arguments))
    assert found == code
    assert words in sentence


def test_export_refuses_a_run_without_a_law_that_graphs_serve(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "infill"
    call(train.main, *small(data, run, "--objectives", "infill", "--steps", 1))
    code, sentence = refusal(capsys, export.main, "--run", run, "--out", tmp_path / "bundle", "--fp16")
    assert code == 78
    assert f"{run} learned neither ar nor canvas" in sentence
    assert not (tmp_path / "bundle").exists()
