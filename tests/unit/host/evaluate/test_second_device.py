"""Evaluation and sampling where the network is not on the CPU: the same figures, and no tensor left behind."""

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import to_builtins

from host import generate
from host.data.shards import Split
from host.evaluate import __main__ as evaluate_command
from host.evaluate.conditions import Wish, conditional_law
from host.evaluate.drafting import evaluate_drafting
from host.evaluate.infilling import evaluate_infilling
from host.evaluate.likelihood import HeldOut, evaluate, exact_likelihood, token_nats
from host.evaluate.scorers import TorchScorer
from host.export import __main__ as export
from host.model.conditions import Condition, Given
from host.model.layouts import causal
from host.model.network import Denoiser, config_named
from host.sampling.blocks import Template, write
from host.sampling.many import open_canvas, sample_autoregressive, sample_many
from host.sampling.reference import Settings, sample
from host.train import run_folder
from host.train.batches import make_batch
from host.train.draft_loss import ChainLoss
from host.train.loss import ChunkedHeadLoss, WeightedLoss
from host.train.objectives import Settings as ObjectiveSettings
from host.train.objectives import parse_mixture
from host.train.picture_loss import PictureLoss
from shared.manifest import read_manifest
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, MASK, PAD
from tests.support.commands import call
from tests.support.pretended import DEVICE, MixedDevices, pretended_device

LENGTH, VOCAB = 24, 40
CONDITIONS = [
    Condition([[7, 8], [9]], torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))),
    Condition([[11]]),
    Condition((), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))),
]


@pytest.fixture(scope="module")
def model() -> Denoiser:
    """Of random weights, with all that a network can have."""
    torch.manual_seed(2)
    shape = replace(config_named("debug"), vocab_size=VOCAB, canvas_len=LENGTH, draft_depth=3, conditions=True)
    network = Denoiser(shape).eval().requires_grad_(False)
    for p in network.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return network


@pytest.fixture(params=["pretended", *["cuda"] * torch.cuda.is_available()])
def there(model: Denoiser, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Denoiser]:
    if request.param == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield deepcopy(model).to("cuda")
        return
    with pretended_device() as device:
        yield deepcopy(model).to(device)


def held_out(n: int = 12) -> HeldOut:
    rng = np.random.default_rng(0)
    canvases = np.full((n, LENGTH), PAD, np.uint16)
    for row, end in zip(canvases, rng.integers(4, LENGTH + 3, n), strict=True):
        row[0] = BOS
        row[1:end] = rng.integers(FIRST_TEXT_ID, VOCAB, min(end, LENGTH) - 1)
        row[end : end + 1] = EOS
    return HeldOut("noise", canvases, np.ones(VOCAB, np.int64))


def settings(n: int = 3, temperature: float = 0.9) -> list[Settings]:
    return [Settings(seed, steps=6, temperature=temperature, top_k=VOCAB) for seed in range(n)]


def sampled(model: Denoiser) -> list[list[int]]:
    canvas = open_canvas(LENGTH)
    texts = [sample(model, canvas, fill=canvas == MASK, schedule="linear", settings=one) for one in settings(2)]
    return [one.canvas.tolist() for one in texts]


def written(model: Denoiser) -> list[list[list[int]]]:
    fills: list[tuple[Template, bool]] = [([[7, 8]], True), ([[7, 8], 4, [9]], False)]
    return [
        write(
            model,
            template,
            settings=settings(1)[0],
            open_end=open_end,
            window=3,
            condition=CONDITIONS[0],
            guidance=guidance,
        ).gaps
        for template, open_end in fills
        for guidance in (0.0, 1.5)
    ]


MEASURED: dict[str, Callable[[Denoiser], Any]] = {
    "left to right": lambda model: exact_likelihood(token_nats(model, held_out().canvases), held_out()),
    "infilling": lambda model: evaluate_infilling(
        model, held_out(), token_nats=token_nats(model, held_out().canvases), draws=2, canvas=True
    ),
    "canvas": lambda model: evaluate(TorchScorer(model), held_out(), "linear", draws=2),
    "drafting": lambda model: evaluate_drafting(model, longer(), [0.0, 0.9]),
    "condition": lambda model: conditional_law(model, held_out(3), [Wish(one) for one in CONDITIONS], "both"),
    "scores of a canvas": lambda model: TorchScorer(model).logits(open_canvas(LENGTH).numpy(), 0.7).tolist(),
    "canvas sampler": sampled,
    "canvas sampler, many": lambda model: [one.canvas.tolist() for one in sample_many(model, "linear", settings())],
    "block sampler": written,
    "block sampler, many": lambda model: sample_autoregressive(
        model, settings(), conditions=CONDITIONS, guidance=1.0
    ).tolist(),
}


def longer() -> HeldOut:
    """Whole canvases, so that each gives a prompt."""
    canvases = np.random.default_rng(0).integers(FIRST_TEXT_ID, VOCAB, (3, LENGTH)).astype(np.uint16)
    canvases[:, 0] = BOS
    return HeldOut("noise", canvases, np.ones(VOCAB, np.int64))


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [one for part in value for one in numbers(part)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.parametrize("name", MEASURED)
def test_second_device_gives_the_figures_of_the_cpu(name: str, model: Denoiser, there: Denoiser) -> None:
    found, expected = (numbers(to_builtins(MEASURED[name](one))) for one in (there, model))
    assert len(found) > 1 and found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("mixture", ["ar=2,infill,canvas,draft=.5", "ar"])
def test_second_device_has_the_losses_of_the_cpu(mixture: str, model: Denoiser, there: Denoiser) -> None:
    """Of all stages, forward: training goes through them on CUDA."""
    made = make_batch(
        Split((held_out(32).canvases,)),
        step=0,
        seed=1,
        batch_size=32,
        micro_size=8,
        mixture=parse_mixture(mixture),
        settings=ObjectiveSettings(),
    )
    losses: list[Callable[[Denoiser], torch.nn.Module]] = [lambda model: WeightedLoss(model, ChunkedHeadLoss)]
    losses += [ChainLoss, PictureLoss] if mixture == "ar" else []
    for part in made.parts:
        part = part.in_buckets()
        if mixture == "ar":  # one word and one picture of each text
            shown = [Condition([[7 + i]], CONDITIONS[0].pictures) for i in range(len(part.lengths))]
            part = replace(part, given=Given.of(shown))
        for loss in losses:
            assert float(loss(there)(part.on(there.device))) == pytest.approx(float(loss(model)(part)), rel=1e-4)


def test_second_device_is_that_of_autocast(there: Denoiser) -> None:
    seen = set[torch.dtype]()
    there.head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    sample_many(there, "linear", settings(1), torch.bfloat16)
    sample_autoregressive(there, settings(1), dtype=torch.bfloat16)
    assert seen == {torch.bfloat16}


@pytest.mark.slow
def test_second_device_commands_print_what_they_do_on_the_cpu(
    joint_runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # float32 on both
    body, run = joint_runs
    commands: list[tuple[Callable[[], None], list[object]]] = [
        (evaluate_command.main, ["--run", run, "--stories", 4, "--draws", 1, "--drafts", "--json"]),
        (evaluate_command.main, ["--samples", body, "--scorer", body, "--count", 2, "--json"]),
        (generate.main, ["Tom had", "--run", run, "--temperature", 0]),
        (generate.main, ["Tom had", "--run", run, "--steps", 4, "--temperature", 0]),
    ]
    for main, arguments in commands:
        printed = []
        for device in (torch.device("cpu"), DEVICE):
            capsys.readouterr()
            with pretended_device():
                monkeypatch.setattr(run_folder, "best_device", lambda device=device: device)
                call(main, *arguments)
            printed.append(re.findall(r"-?\d+\.\d+|[^\W\d_]+", re.sub(r"[\d.]+ s\n", "", capsys.readouterr().out)))
        for near, far in zip(*printed, strict=True):
            assert near == far or float(far) == pytest.approx(float(near), rel=1e-4), (near, far)


@pytest.mark.slow
def test_second_device_makes_the_same_bundle(
    joint_runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = []
    for name, device in (("near", torch.device("cpu")), ("far", DEVICE)):
        with pretended_device():
            monkeypatch.setattr(run_folder, "best_device", lambda device=device: device)
            call(export.main, "--run", joint_runs[1], "--out", tmp_path / name, "--target", "cpu", "--stories", 2)
        manifests.append(read_manifest(tmp_path / name))
    near, far = manifests
    assert [graph.sha256 for graph in far.graphs] == [graph.sha256 for graph in near.graphs]
    assert numbers(to_builtins(far.evaluations)) == pytest.approx(numbers(to_builtins(near.evaluations)), rel=1e-4)
    assert numbers(to_builtins(far.laws)) == pytest.approx(numbers(to_builtins(near.laws)), rel=1e-4)


def test_second_device_refuses_what_cuda_would(model: Denoiser) -> None:
    with pretended_device():
        refuses_and_takes(deepcopy(model).to(DEVICE))


def refuses_and_takes(there: Denoiser) -> None:
    near, far = torch.arange(4.0), torch.arange(4.0, device=DEVICE)
    for mixed in (
        lambda: near + far,
        lambda: torch.stack([near, far]),
        lambda: far.gather(0, near.long()),
        lambda: near[far.long()],
        lambda: far.numpy(),
        lambda: there(*causal(torch.tensor([[BOS, 7]]))),
        lambda: there.logits(torch.zeros(2, 64, device=DEVICE), 0) + torch.zeros(VOCAB),
    ):
        with pytest.raises((MixedDevices, RuntimeError, TypeError)):
            mixed()
    assert (far + torch.tensor(1.0)).tolist() == [1, 2, 3, 4] and far[near.long()].tolist() == near.tolist()
    assert (far.cpu() + near).tolist() == [0, 2, 4, 6] and near.to(DEVICE).device == DEVICE
    assert float(far.sum()) == 6 and torch.tensor([1, 2], device=DEVICE).device == DEVICE
