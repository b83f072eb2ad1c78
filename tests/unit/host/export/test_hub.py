"""`host.export --hf`: a folder that transformers loads without this project, and that training goes on from."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import torch
from safetensors.torch import load_file

from host import generate
from host.data.prepare import prepare
from host.evaluate.laws import law_figures
from host.evaluate.likelihood import held_out_split
from host.export import __main__ as export
from host.export.hub.model_card import CARD
from host.model.layouts import causal
from host.model.network import NO_PADDING, Denoiser, ends_impossible
from host.sampling.blocks import write
from host.sampling.reference import TOP_K, Settings
from host.train import trainer as train
from host.train.checkpoint import BEST, find_checkpoint, load_model
from host.train.published import CONFIG, WEIGHTS, read_published
from host.train.run_folder import data_of, load_run, read_config, training_stages
from shared.manifest import TOKENIZER, bundle_digest, read_manifest, sha256_of
from shared.tokens import BOS, EOS, MASK, PAD
from tests.support.commands import call, refusal, small

ROOT: Final = Path(__file__).resolve().parents[4]
SHIPPED: Final = ROOT / "bundle" / "tinystories"

LOADED: Final = """
import sys
sys.modules.update(dict.fromkeys(("host", "edge", "shared")))
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

torch.set_num_threads(1)
folder, asked, answers, card = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
asked = torch.load(asked)
prompts = tokenizer(asked["prompts"], return_tensors="pt", padding=True)
ids, real = prompts.input_ids, prompts.attention_mask
greedy = dict(do_sample=False, attention_mask=real)
with torch.no_grad():
    found = {
        "ids": ids,
        "padded": model(ids, attention_mask=real).logits[:, -1],
        "causal": model(asked["text"]).logits,
        "loss": model(asked["text"], labels=asked["text"]).loss,
        "canvas": model.canvas_logits(asked["canvas"]),
        "drafts": model.drafts(asked["text"]),
        "greedy": model.generate(ids, **greedy),
        "uncached": model.generate(ids, use_cache=False, **greedy),
        "beams": model.generate(ids[:1], num_beams=2, max_new_tokens=4, do_sample=False),
        "defaults": model.generation_config.to_diff_dict(),
        "literal": tokenizer("<MASK>").input_ids,
        "decoded": tokenizer.decode(ids[1], skip_special_tokens=True),
    }
try:
    model(torch.full((1, model.config.canvas_len + 1), 5))
except ValueError as error:
    found["too long"] = str(error)
blocks = open(card).read().split("```python")[1:]
for block in blocks:
    exec(block.split("```")[0].replace('folder = "."', "folder = sys.argv[1]"))
torch.save(found | {"blocks": len(blocks)}, answers)
"""


def answers_of(folder: Path, scratch: Path, asked: dict[str, object]) -> dict[str, object]:
    """What transformers makes of a folder, in a process that cannot import this project."""
    torch.save(asked, scratch / "asked.pt")
    arguments = (folder, scratch / "asked.pt", scratch / "answers.pt", folder / CARD)
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *map(str, arguments)],
        cwd=scratch,
        env={**os.environ, "HF_HOME": str(scratch / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for complaint in ("not initialized", "newly initialized", "not used", "MISSING", "UNEXPECTED"):
        assert complaint not in done.stderr, done.stderr
    answers: dict[str, object] = torch.load(scratch / "answers.pt")
    return answers


def same(found: object, expected: torch.Tensor) -> bool:
    assert isinstance(found, torch.Tensor)
    return torch.allclose(found, expected, rtol=0, atol=2e-5)


def canvas_of(length: int) -> torch.Tensor:
    """Two: text, masks and text; masks, an end, and nothing."""
    canvas = torch.full((2, length), MASK)
    canvas[:, 0] = BOS
    canvas[0, 20:30], canvas[1, 3:9] = torch.arange(10, 20), 42
    canvas[1, 40], canvas[1, 41:] = EOS, PAD
    return canvas


@torch.no_grad()
def laws_of(model: Denoiser, text: torch.Tensor, canvas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """→ scores left to right and of a canvas, by the project's own network."""
    states = model(*causal(text)).flatten(0, 1)
    left_to_right = model.logits(states, torch.full((len(states),), NO_PADDING)).view(*text.shape, -1)
    of_canvas = model.logits(model.score_canvas(canvas).flatten(0, 1), ends_impossible(canvas).flatten())
    return left_to_right, of_canvas.view(*canvas.shape, -1)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_hub_folder_gives_transformers_the_same_laws(
    joint_runs: tuple[Path, Path], published: Path, tmp_path: Path, dtype: str
) -> None:
    folder = published
    if dtype == "float16":
        folder = tmp_path / "half"
        call(export.main, "--run", joint_runs[1], "--hf", folder, "--hf-dtype", "float16", "--stories", 4)
        assert (folder / WEIGHTS).stat().st_size < 0.6 * (published / WEIGHTS).stat().st_size
    model, _ = load_model(joint_runs[1] / BEST)
    if dtype == "float16":
        model.load_state_dict({name: p.half().float() for name, p in model.named_parameters()}, strict=False)
    text, canvas = torch.tensor([[BOS, *range(30, 60)], [BOS, *range(60, 90)]]), canvas_of(model.config.canvas_len)
    prompts = ["Tom had", "Anna had a ball. The ball"]
    found = answers_of(folder, tmp_path, {"text": text, "canvas": canvas, "prompts": prompts})
    left_to_right, of_canvas = laws_of(model, text, canvas)
    assert same(found["causal"], left_to_right) and same(found["canvas"], of_canvas)
    nats = torch.nn.functional.cross_entropy(left_to_right[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    assert float(str(found["loss"].item())) == pytest.approx(float(nats), rel=1e-5)  # type: ignore[attr-defined]
    ids, greedy, uncached = (torch.as_tensor(found[name]) for name in ("ids", "greedy", "uncached"))
    settings = Settings(seed=0, steps=1, selection="random", temperature=0.0, top_k=TOP_K, top_p=1.0)
    for row, padded, wrote in zip(ids, torch.as_tensor(found["padded"]), greedy, strict=True):
        prompt = row[row != PAD].tolist()
        assert prompt[0] == BOS
        alone, _ = laws_of(model, torch.tensor([prompt]), canvas)
        assert same(padded, alone[0, -1])
        expected = write(model, [prompt[1:]], settings=settings, open_end=True).gaps[0]
        assert wrote[len(row) :].tolist()[: len(expected)] == expected[: len(wrote) - len(row)]
    assert torch.equal(greedy, uncached)
    writer_drafts = torch.as_tensor(found["drafts"])
    assert torch.equal(writer_drafts, drafts_of(model, text))
    assert found["defaults"]["temperature"] == 0.8  # type: ignore[index]
    assert MASK not in found["literal"][1:] and found["literal"][0] == BOS  # type: ignore[index]
    assert found["decoded"] == prompts[1]
    assert found["too long"] == "257 tokens are more than the 256 positions of this model"
    assert found["blocks"] == 2


@torch.no_grad()
def drafts_of(model: Denoiser, text: torch.Tensor) -> torch.Tensor:
    """By the definition of the chain: the state of the row before the last token, then that token and the drafts."""
    assert model.drafter is not None
    state, token, drafts = model(*causal(text[:, :-1]))[:, -1], text[:, -1], []
    for step in model.drafter.depths:
        state = step(state, model.token_embedding(token))
        token = model.draft_logits(state, torch.full((len(text),), NO_PADDING)).argmax(-1)
        drafts.append(token)
    return torch.stack(drafts, 1)


@pytest.mark.slow
def test_hub_folder_holds_the_weights_and_the_figures(joint_runs: tuple[Path, Path], published: Path) -> None:
    (model, progress), (again, theirs) = load_run(joint_runs[1]), load_run(published)
    assert again.config == model.config and theirs.objectives == progress.objectives
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    training = read_published(published).training
    assert training.stages == training_stages(joint_runs[1]) and [stage.name for stage in training.stages] == ["a", "b"]
    assert training.laws == (law_figures(model, held_out_split(data_of(joint_runs[1]), 4), progress.objectives),)
    card = (published / CARD).read_text("utf-8")
    assert f"| {training.laws[0].left_to_right_bits_per_byte.value:.4f}" in card.replace("byte |", "|")
    assert "licence: unknown" in card and card.startswith("---\nlicense: other\n")
    assert oct((published / WEIGHTS).stat().st_mode & 0o777) == oct((published / CONFIG).stat().st_mode & 0o777)


@pytest.mark.slow
def test_hub_folder_beside_a_bundle_has_its_figures(
    joint_runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = tmp_path / "mine", tmp_path / "hub"
    call(export.main, "--run", joint_runs[1], "--out", bundle, "--target", "cpu", "--hf", out, "--stories", 4)
    training, manifest = read_published(out).training, read_manifest(bundle)
    assert training.bundle_sha256 == bundle_digest(bundle)
    assert (training.laws, training.evaluations) == (manifest.laws[:1], manifest.evaluations[:1])
    assert (training.stages, training.tokens) == (manifest.data.stages, manifest.data.tokens_seen)
    before = (out / CONFIG).read_bytes()
    call(export.main, "--run", joint_runs[1], "--hf", out, "--hf-figures", bundle)  # replaced, with the same
    assert (out / CONFIG).read_bytes() == before
    code, sentence = refusal(
        capsys, export.main, "--run", joint_runs[0], "--hf", tmp_path / "b", "--hf-figures", bundle
    )
    assert (code, sentence) == (78, f"{bundle} is not of this run: its tokenizer or its stages of training are others")


@pytest.mark.slow
def test_hub_folder_replaces_a_lost_run(
    data: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The body goes on, then its drafter; every stage is counted, also when the folder is gone."""
    out, body, drafter = tmp_path / "folder", tmp_path / "body", tmp_path / "drafter"
    shutil.copytree(published, out)
    before = read_published(out).training
    call(train.main, *small(data, body, "--objectives", "ar,infill", "--steps", 1, "--lr", 1e-9, "--init", out))
    call(
        train.main,
        "--data",
        data,
        "--out",
        drafter,
        "--batch-size",
        8,
        "--stage",
        "drafter",
        "--init",
        out,
        "--steps",
        1,
    )
    shutil.rmtree(out)
    for run in (body, drafter):
        assert [stage.name for stage in training_stages(run)] == ["a", "b", run.name]
        assert training_stages(run)[:2] == before.stages
    config = read_config(body)
    assert config.init_work is not None and config.init_work.tokens == before.tokens > 0
    weights, started = load_file(published / WEIGHTS), load_file(find_checkpoint(drafter))
    trunk = [name for name in weights if not name.startswith("drafter.")]
    assert trunk and all(torch.equal(weights[name], started[f"ema.{name}"]) for name in trunk)
    moved = load_file(find_checkpoint(body))
    assert all(torch.allclose(weights[name], moved[f"ema.{name}"], atol=1e-6) for name in trunk)
    call(generate.main, "Tom had", "--run", published)
    assert "passes" in capsys.readouterr().out


def test_hub_folder_gives_its_tokenizer_to_other_text(published: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("\n\n".join(f"Ben saw {i} cats." for i in range(400)))
    meta = prepare([str(tmp_path / "more.txt")], tmp_path / "more", tokenizer_of=published)
    assert meta.tokenizer_sha256 == sha256_of(data / TOKENIZER) != sha256_of(published / TOKENIZER)


def test_shipped_hub_folder_is_of_the_shipped_bundle() -> None:
    folder = SHIPPED.with_name("tinystories-hf")
    if not folder.is_dir():
        pytest.skip("the shipped model is not published in this checkout")
    published, manifest = read_published(folder), read_manifest(SHIPPED)
    training = published.training
    assert training.bundle_sha256 == bundle_digest(SHIPPED)
    assert (training.laws, training.evaluations) == (manifest.laws[:1], manifest.evaluations[:1])
    assert (training.stages, training.tokens) == (manifest.data.stages, manifest.data.tokens_seen)
    assert training.tokenizer_sha256 == manifest.tokenizer_sha256
    weights = load_file(folder / WEIGHTS).values()
    assert sum(t.numel() for t in weights if t.is_floating_point()) == manifest.model.parameters
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 23_000_000
