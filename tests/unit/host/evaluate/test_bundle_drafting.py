"""`host.evaluate --bundle --drafts`: what the graphs that ship keep of their drafts, and what they write."""

import json
from pathlib import Path

import numpy as np
import pytest

from edge.backends.ort_rows import OrtRows
from edge.serving.loaded_bundle import LoadedBundle
from host.evaluate import __main__ as evaluate
from host.evaluate.bundle_drafting import OFF, ON, TEMPERATURES, law_of, measure_prompted, write_text
from host.evaluate.drafting import PROMPT_TOKENS
from host.export import __main__ as export
from host.sampling.blocks import write
from host.sampling.reference import Settings
from host.train.run_folder import load_run
from shared.manifest import MANIFEST, bundle_digest, read_manifest
from shared.messages import GenerateRequest
from shared.tokens import EOS, FIRST_TEXT_ID, PAD
from tests.support.commands import call, refusal

COUNT = 6


@pytest.fixture(scope="module")
def bundle(joint_runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the run with a drafter, in INT8."""
    out = tmp_path_factory.mktemp("bundles") / "stories"
    call(export.main, "--run", joint_runs[1], "--out", out, "--target", "cpu", "--int8", "--stories", 4)
    return out


@pytest.mark.slow
def test_bundle_drafting_prints_all_of_it_in_one_command(
    bundle: Path, joint_runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--bundle", bundle, "--drafts", "--scorer", joint_runs[0], "--count", COUNT)
    capsys.readouterr()
    call(evaluate.main, *command, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["bundle"] == f"stories@{bundle_digest(bundle)[:12]}" and found["window"] == 3
    assert found["source"] == "stories, valid split"
    assert [one["temperature"] for one in found["prompted"]] == list(TEMPERATURES)
    for one in found["prompted"]:
        assert 1 <= one["same_texts"] == one["texts"] <= 4  # those long enough
        assert 1 <= one["tokens_per_pass"]["value"] <= 4 and len(one["kept"]) == 3
        assert all(0 <= share <= 1 for share in one["kept"])
    on, off, data = found["texts"]
    assert (on["name"], off["name"], data["name"]) == (ON, OFF, "data, valid")
    assert found["same_texts"] == on["texts"] == off["texts"] == COUNT and data["texts"] == 4  # all that there are
    assert {**on, "name": ""} == {**off, "name": ""}
    call(evaluate.main, *command)
    printed = capsys.readouterr().out
    for one in found["prompted"]:
        assert f"{one['tokens_per_pass']['value']:.3f} ± {one['tokens_per_pass']['stderr']:.3f}" in printed
    assert (
        f"{COUNT} are the same with drafting on and off" in printed
        and f"{data['perplexity']['value']:.2f} ±" in printed
    )


@pytest.mark.slow
def test_bundle_drafting_writes_what_the_edge_and_the_reference_write(
    joint_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    """The edge by a request of the same seed; the reference wherever no near tie decided. float32 graphs."""
    bundle = tmp_path / "exact"
    call(export.main, "--run", joint_runs[1], "--out", bundle, "--target", "cpu", "--stories", 4)
    manifest, model = read_manifest(bundle), load_run(joint_runs[1])[0]
    backend, edge, decided = OrtRows(bundle, manifest, threads=1), LoadedBundle.load(bundle, threads=1), 0
    for seed in range(3):
        text = write_text(backend, manifest, law=law_of(manifest, seed, 0.8, 3))
        ids = text.canvas[text.canvas >= FIRST_TEXT_ID].tolist()
        completion = edge.run(edge.prepare(GenerateRequest(prompt="", seed=seed, temperature=0.8, window=3)))
        assert completion.text == edge._texts._tokenizer.decode(ids) and completion.steps == text.passes
        assert text.tokens == len(ids) + (EOS in text.canvas)
        settings = Settings(seed, temperature=0.8, top_k=manifest.top_k)
        told = write(model, [[]], settings=settings, open_end=True)
        if told.margin > 1e-3:
            decided += 1
            assert told.gaps[0] == ids
    assert decided
    edge.close()


def test_bundle_drafting_counts_tokens_over_passes(blocks_bundle: Path) -> None:
    manifest = read_manifest(blocks_bundle)
    backend = OrtRows(blocks_bundle, manifest, threads=1)
    prompts = np.arange(10, 10 + 2 * PROMPT_TOKENS).reshape(2, -1)
    found = measure_prompted(backend, manifest, prompts, 1.0)
    laws = [law_of(manifest, i, 1.0, 3) for i in range(len(prompts))]
    pairs = zip(prompts.tolist(), laws, strict=True)
    texts = [write_text(backend, manifest, prompt=row, law=law) for row, law in pairs]
    tokens = sum(int((text.canvas[1 + PROMPT_TOKENS :] != PAD).sum()) for text in texts)
    assert found.tokens_per_pass.value == pytest.approx(tokens / sum(text.passes for text in texts))
    assert found.same_texts == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "--bundle --drafts needs prompts: name --source FILES, or --scorer AR_RUN with its data"),
        (["--source", "{tmp}/few.txt", "--stories", "3"], "--draws and --stories are about likelihoods"),
        (["--source", "{tmp}/few.txt"], "few.txt has no text of more than 16 tokens: nothing to continue"),
        (["--scorer", "{run}"], "{run} cannot score these samples: its tokenizer is another one than"),
        (["--source", "{tmp}/few.txt", "--count", "0"], "--count must be a number above 0, not 0"),
    ],
)
def test_bundle_drafting_says_what_it_lacks(
    blocks_bundle: Path,
    joint_runs: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    sentence: str,
) -> None:
    (tmp_path / "few.txt").write_text("A.")
    names = {"tmp": tmp_path, "run": joint_runs[0]}
    given = [flag.format(**names) for flag in flags]
    _, said = refusal(capsys, evaluate.main, "--bundle", blocks_bundle, "--drafts", *given)
    assert said.startswith(sentence.format(**names)), said


def test_bundle_drafting_of_a_bundle_without_drafts_is_refused(
    debug_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "few.txt").write_text("A.")
    command = ("--bundle", debug_bundle, "--drafts", "--source", tmp_path / "few.txt")
    assert (debug_bundle / MANIFEST).is_file()
    code, said = refusal(capsys, evaluate.main, *command)
    assert (code, said) == (78, f"{debug_bundle} does not draft: it has no graph of the role draft")
