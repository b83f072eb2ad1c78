"""The measures of infilling and drafting, against the definitions they stand for."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from host.evaluate import __main__ as evaluate
from host.evaluate.drafting import agreement, evaluate_drafting, passes
from host.evaluate.infilling import evaluate_infilling
from host.evaluate.laws import law_figures
from host.evaluate.likelihood import HeldOut, token_nats
from host.model.network import Denoiser, config_named
from host.sampling.blocks import write
from host.sampling.reference import Settings
from host.train import trainer as train
from shared.errors import DataError
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, PAD
from tests.support.commands import call, refusal, small

LENGTH, VOCAB = 48, 40


@pytest.fixture(scope="module")
def model() -> Denoiser:
    torch.manual_seed(2)
    shape = replace(config_named("debug"), vocab_size=VOCAB, canvas_len=LENGTH, time_input=False, draft_depth=3)
    network = Denoiser(shape).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network


def held_out(n: int = 20) -> HeldOut:
    rng = np.random.default_rng(0)
    canvases = np.full((n, LENGTH), PAD, np.uint16)
    for row, end in zip(canvases, rng.integers(2, LENGTH + 5, n), strict=True):
        row[0] = BOS
        row[1:end] = rng.integers(FIRST_TEXT_ID, VOCAB, min(end, LENGTH) - 1)
        row[end : end + 1] = EOS
    return HeldOut("noise", canvases, np.ones(VOCAB, np.int64))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.0])
def test_drafting_counts_the_passes_of_the_reference_decoder(model: Denoiser, temperature: float) -> None:
    for seed in range(6):
        settings = Settings(seed, temperature=temperature, top_k=VOCAB)
        text = write(model, [[7, 8, 9]], settings=settings, open_end=True).gaps[0]
        canvas = torch.tensor(([BOS, 7, 8, 9, *text, EOS] + [PAD] * LENGTH)[:LENGTH])
        found = agreement(model, canvas, 4, settings)
        for window in (1, 2, 3):
            assert (
                passes(found, window, found.same)
                == write(model, [[7, 8, 9]], settings=settings, open_end=True, window=window).kept
            )


def test_drafting_is_summed_up_over_texts(model: Denoiser) -> None:
    made = evaluate_drafting(model, held_out(), [0.0, 1.0])
    assert [(one.temperature, one.window) for one in made] == [(t, w) for t in (0.0, 1.0) for w in (1, 2, 3)]
    for one in made:
        assert 1 <= one.tokens_per_pass.value <= one.window + 1 and len(one.agreement) == one.window
        if one.temperature == 0:  # both rules keep what is the law's best token
            assert one.rejection.value == pytest.approx(one.tokens_per_pass.value)


def test_infilling_of_an_untrained_network_is_no_better_than_its_writing(model: Denoiser) -> None:
    """One that predicts every token alike is exact: all three figures are the same."""
    even = Denoiser(model.config).eval()
    with torch.no_grad():
        even.head.weight.zero_()
    own = token_nats(even, held_out(200).canvases)
    found = evaluate_infilling(even, held_out(200), token_nats=own, draws=8, canvas=True)
    exact = np.log(VOCAB - 3)
    assert found.infilling.value == pytest.approx(exact, rel=1e-5)
    assert found.autoregressive.value == pytest.approx(exact, rel=1e-5)
    assert found.bound is not None  # of text tokens alone where text follows, of one more at an end
    assert abs(found.bound.value - exact) < 4 * found.bound.stderr + 0.06
    assert found.gap_tokens > 1000


@pytest.mark.slow
def test_laws_of_a_run_are_all_measured(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    call(train.main, *small(data, a, "--objectives", "ar=2,infill,canvas", "--steps", 4))
    call(train.main, "--data", data, "--out", b, "--batch-size", 8, "--stage", "drafter", "--init", a, "--steps", 2)
    capsys.readouterr()
    call(evaluate.main, "--run", b, "--draws", 2, "--stories", 8, "--json")
    laws = json.loads(capsys.readouterr().out)
    assert set(laws) == {"source", "nats_per_token", "bits_per_byte", "infilling", "canvas"}
    assert laws["infilling"]["bound"]["stderr"] > 0
    call(evaluate.main, "--run", b, "--draws", 2, "--stories", 8)
    printed = capsys.readouterr().out
    assert printed.startswith("autoregressive: ") and "infilling is" in printed and "NELBO" in printed
    code, sentence = refusal(capsys, evaluate.main, "--run", a, "--drafts", "--stories", 8)
    assert code == 78
    assert sentence.startswith("--drafts needs a run with a drafter")


def test_drafting_on_text_that_is_too_short_is_refused_or_left_out(model: Denoiser) -> None:
    canvases = np.full((3, LENGTH), PAD, np.uint16)
    canvases[:, :6] = [BOS, 7, 8, 9, 10, EOS]
    tiny = HeldOut("tiny", canvases, np.ones(VOCAB, np.int64))
    with pytest.raises(DataError, match=r"^tiny has no story of more than 16 tokens, to measure drafts on$"):
        evaluate_drafting(model, tiny, [0.0])
    assert law_figures(model, tiny, ["ar"]).tokens_per_pass is None
    assert law_figures(model, held_out(), ["ar"]).tokens_per_pass
