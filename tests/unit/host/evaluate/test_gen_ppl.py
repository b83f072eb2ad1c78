"""Samples in numbers: many at once as one by one, scored exactly, beside the data; and the sweep over settings."""

import inspect
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from host.data.shards import load_data
from host.data.tokenizer import load_tokenizer
from host.device import mixed_precision_dtype
from host.evaluate import __main__ as evaluate
from host.evaluate import gen_ppl, sweep
from host.evaluate.gen_ppl import SampleScorer, Scored, canvases_of, length_distance, score_samples, words_of
from host.export.random_weights import untrained
from host.model.layouts import causal
from host.model.network import NO_PADDING, Denoiser, config_named
from host.sampling.many import open_canvas, sample_autoregressive, sample_many
from host.sampling.reference import Settings, sample
from host.train import trainer as train
from host.train.checkpoint import find_checkpoint, load_model
from host.train.run_folder import load_run
from shared.errors import ConfigError
from shared.figures import Figure
from shared.manifest import TOKENIZER, SamplingDefaults
from shared.tokens import BOS, EOS, FIRST_TEXT_ID, PAD
from tests.support.commands import call, refusal, small
from tests.support.networks import assert_sound

TOLERANCE = 5e-5  # of log-probabilities, between rows alone and in a batch


@pytest.fixture(scope="module")
def network() -> Denoiser:
    model, _, _ = untrained(replace(config_named("debug"), canvas_len=48))
    return model


@pytest.fixture(scope="session")
def scorer_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "scorer"
    call(train.main, *small(data, out, "--objectives", "ar", "--steps", 40, "--lr", 3e-3, "--valid-every", 40))
    return out


def canvas(*tokens: int, length: int = 16) -> list[int]:
    return [BOS, *tokens, EOS, *[PAD] * (length - len(tokens) - 2)]


RULES = {
    "random": Settings(0, steps=8),
    "confidence, cold": Settings(0, steps=6, selection="confidence", temperature=0.7),
    "threshold": Settings(0, steps=48, threshold=0.05),
    "entropy bound": Settings(0, steps=48, entropy_bound=9.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_sample_many_is_the_same_as_one_by_one(network: Denoiser, rule: str) -> None:
    settings = [replace(RULES[rule], seed=seed) for seed in range(20)]  # more than one network call takes
    decided = 0
    for one, found in zip(settings, sample_many(network, "linear", settings), strict=True):
        start = open_canvas(48)
        alone = sample(network, start, fill=start != BOS, schedule="linear", settings=one)
        assert_sound(found.canvas.numpy())
        if alone.margin > TOLERANCE:  # else rounding decides
            decided += 1
            assert torch.equal(found.canvas, alone.canvas)
            assert found.steps == alone.steps
    assert decided >= 2


@pytest.mark.slow
def test_sample_autoregressive_has_the_frequencies_of_the_model(network: Denoiser) -> None:
    """The first token of many canvases, against the model's own distribution."""
    shape = replace(config_named("debug"), vocab_size=12, canvas_len=3, time_input=False)
    torch.manual_seed(3)
    model = Denoiser(shape)
    with torch.no_grad():
        model.head.weight.normal_(std=0.15)
        logits = model.logits(model(*causal(torch.tensor([[BOS]])))[0], torch.tensor([NO_PADDING]))
    expected = 3000 * logits.softmax(-1)[0].numpy()
    found = sample_autoregressive(model, [Settings(seed, top_k=12) for seed in range(3000)]).numpy()
    observed = np.bincount(found[:, 1], minlength=12)
    possible = expected > 0
    assert observed[~possible].sum() == 0
    assert (
        float(((observed - expected)[possible] ** 2 / expected[possible]).sum()) < 27.9
    )  # chi square, 9 degrees, 0.1 %
    for row in found:
        assert_sound(row)
    assert np.array_equal(
        sample_autoregressive(model, [Settings(s, top_k=12) for s in (5, 2)]).numpy(), found[[5, 2]]
    )  # a seed alone decides


def test_sample_autoregressive_writes_what_was_learned(scorer_run: Path) -> None:
    model, _ = load_model(find_checkpoint(scorer_run))
    (row,) = sample_autoregressive(model, [Settings(0, temperature=0)]).numpy()
    assert EOS in row
    assert_sound(row)


def test_score_perplexity_is_that_of_the_exact_likelihood(scorer_run: Path, data: Path) -> None:
    """By hand: every token given the ones before it."""
    scorer = SampleScorer.load(scorer_run, scorer_run / TOKENIZER)
    canvases = load_data(data).valid.take(np.arange(3))
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for row in canvases.astype(np.int64):
            length = int((row != PAD).sum())
            states = scorer.model(*causal(torch.from_numpy(row[None, : length - 1])))[0]
            scores = scorer.model.logits(states, torch.full((length - 1,), NO_PADDING)).log_softmax(-1)
            nats -= float(sum(scores[i - 1, row[i]] for i in range(1, length)))
            tokens += length - 1
    assert scorer.score("", canvases).perplexity.value == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_score_entropy_distinct_and_repetition_by_hand(scorer_run: Path) -> None:
    a, b, c = range(FIRST_TEXT_ID, FIRST_TEXT_ID + 3)
    scorer = SampleScorer.load(scorer_run, scorer_run / TOKENIZER)
    found = scorer.score("", np.array([canvas(a, b, a, b, a, b), canvas(a, c)], np.uint16))
    p = np.array([4, 3, 1]) / 8
    assert found.unigram_entropy_bits == pytest.approx(float(-(p * np.log2(p)).sum()))
    assert found.distinct == pytest.approx((3 / 8, 3 / 6, 2 / 4))
    assert found.repetition == pytest.approx(1 / 3)  # abab, baba, and abab again
    assert found.lengths == (0, 1, 0, 1, 0, 0, 0, 0)
    empty = scorer.score("", np.array([canvas()], np.uint16))
    assert (empty.unigram_entropy_bits, empty.distinct, empty.repetition) == (0.0, (0.0, 0.0, 0.0), 0.0)


def test_score_of_dull_text_is_betrayed_by_entropy_and_n_grams(scorer_run: Path, data: Path) -> None:
    scorer = SampleScorer.load(scorer_run, scorer_run / TOKENIZER)
    stories = load_data(data).valid.take(np.arange(4))
    normal, dull = scorer.score("", stories), scorer.score("", np.repeat(stories[:1], 4, axis=0))
    assert dull.distinct[2] < normal.distinct[2]
    assert dull.unigram_entropy_bits < normal.unigram_entropy_bits


def test_length_distance_compares_histograms_by_their_parts() -> None:
    def of(*lengths: int) -> Scored:
        return Scored("", sum(lengths), Figure(1.0, 0.0), 0.0, (0.0, 0.0, 0.0), 0.0, 0.0, lengths)

    assert length_distance(of(1, 1), of(2, 2)) == 0
    assert length_distance(of(2, 0), of(0, 5)) == 1
    assert length_distance(of(1, 1), of(4, 0)) == pytest.approx(0.5)


def test_sample_autoregressive_takes_the_settings_of_a_bundle(scorer_run: Path) -> None:
    _, drawn = canvases_of(scorer_run, SampleScorer.load(scorer_run, scorer_run / TOKENIZER), 2)
    model, _ = load_run(scorer_run)
    dtype = mixed_precision_dtype(torch.device("cpu"))
    usual, warmer = (
        sample_autoregressive(model, [Settings(seed, temperature=degrees) for seed in range(2)], dtype=dtype).numpy()
        for degrees in (SamplingDefaults().temperature, 1.0)
    )
    assert np.array_equal(drawn, usual) and not np.array_equal(drawn, warmer)


def test_sample_autoregressive_is_truncated_as_a_canvas_is(scorer_run: Path) -> None:
    """Every token is among the four best of its position; from the whole vocabulary hardly a text would be."""
    model, _ = load_run(scorer_run)
    canvases = sample_autoregressive(model, [Settings(seed, temperature=2.0, top_k=4) for seed in range(4)])
    for row in canvases:
        length = int((row != PAD).sum())
        with torch.no_grad():
            states = model(*causal(row[None, : length - 1]))[0]
        logits = model.logits(states, torch.full((length - 1,), NO_PADDING))
        better = (logits > logits.gather(-1, row[1:length, None])).sum(-1)
        assert int(better.max()) < 4


def test_words_of_a_canvas_are_lower_case_and_end_before_a_cut_one(data: Path) -> None:
    tokenizer = load_tokenizer(load_data(data).tokenizer_path)
    ids = tokenizer.encode("Tom's dog, 3 CATS and naïve fiš", add_special_tokens=False).ids
    whole = np.array([[BOS, *ids, EOS, PAD]])
    assert list(words_of(tokenizer, whole)) == ["tom's", "dog", "cats", "and", "naïve", "fiš"]
    assert list(words_of(tokenizer, whole[:, :-2])) == ["tom's", "dog", "cats", "and", "naïve"]


def test_non_words_are_those_that_the_training_text_lacks(scorer_run: Path, data: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Anna had a red xball.\n\nBen was happy, qqq.")
    ours, stories = score_samples(texts, scorer_run, source=None, split="test", count=2)
    assert ours.non_words == pytest.approx(2 / 9)
    assert (stories.name, stories.non_words) == ("data, test", 0.0)


def test_score_takes_200_texts_by_default() -> None:
    assert gen_ppl.COUNT == inspect.signature(sweep.sweep).parameters["count"].default == 200


@pytest.mark.slow
def test_score_of_a_run_and_of_files_stands_beside_the_data(
    trained: Path, scorer_run: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for samples, name in ((trained, "trained, sampled"), (scorer_run, "scorer, sampled"), (corpus, "stories")):
        call(evaluate.main, "--samples", samples, "--scorer", scorer_run, "--count", 3, "--source", corpus)
        lines = capsys.readouterr().out.splitlines()
        assert [line[:32].strip() for line in lines] == [
            "texts",
            name,
            "stories",
            "length in eighths of the canvas,",
            name,
            "stories",
        ]
    assert lines[1][32:] == lines[2][32:]  # the texts are the data themselves
    call(evaluate.main, "--samples", trained, "--scorer", scorer_run, "--count", 2, "--json")
    ours, data = json.loads(capsys.readouterr().out)
    assert (ours["texts"], data["texts"], sum(ours["lengths"])) == (2, 2, 2)
    assert ours["perplexity"]["value"] > 1


def test_sweep_prints_one_table_and_draws_one_picture(
    trained: Path, scorer_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    settings = sweep.grid((2, 4), (1.0, 0.5), (0.5,), (1.0,))
    assert len(settings) == (4 * 2 + 1 + 1) + 2 * 2
    points = sweep.sweep(run, scorer_run, count=2, settings=settings)
    table = capsys.readouterr().out.splitlines()
    assert table[1].startswith("data") and len(table) == len(settings) + 3
    assert max(len(line) for line in table[:-1]) <= 120
    assert " distinct-1/2/3 " in table[0] and " non-words " in table[0]
    for line, point in zip(table[2:-1], points, strict=True):
        one, two, three = point.scored.distinct
        assert f" {one:.3f}/{two:.3f}/{three:.3f} " in line
    assert all(2 <= p.steps <= 3 for p in points if p.setting.strength == "2 steps")  # ends may wait for a third
    assert {line[:14].strip() for line in table[2:-1]} == {
        "random",
        "confidence",
        "margin",
        "entropy",
        "threshold",
        "entropy bound",
    }
    assert matplotlib.image.imread(run / sweep.PICTURE).shape == (800, 900, 4)


def test_sweep_picture_shows_every_point_and_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(perplexity: float, entropy: float) -> Scored:
        return Scored("", 9, Figure(perplexity, 0.5), entropy, (0.0, 0.0, 0.0), 0.0, 0.0, ())

    settings = sweep.grid((2, 4), (1.0,), (), ())[:2]
    points = [sweep.Point(setting, n, of(10.0 * n, n)) for setting, n in zip(settings, (2.0, 4.0), strict=True)]
    drawn: list[Any] = []
    monkeypatch.setattr(sweep, "save_picture", lambda figure, path: drawn.append(figure))
    sweep.draw(tmp_path / "sweep.png", points, of(7.0, 3.0))
    above, below = drawn[0].axes
    assert above.containers[0].lines[0].get_xydata().tolist() == [[2, 20], [4, 40]]
    assert below.lines[0].get_xydata().tolist() == [[2, 2], [4, 4]]
    assert [list(axes.lines[-1].get_ydata()) for axes in (above, below)] == [[7, 7], [3, 3]]
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["data", points[0].setting.line]


def test_sweep_picture_that_cannot_be_written_is_one_sentence(trained: Path, scorer_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / sweep.PICTURE).mkdir()
    with pytest.raises(ConfigError, match=r"^the picture .*sweep\.png cannot be written: Is a directory$"):
        sweep.sweep(run, scorer_run, count=1, settings=sweep.grid((2,), (1.0,), (), ())[:1])


def test_sweep_goes_from_4_to_256_steps() -> None:
    assert {s.settings.steps for s in sweep.grid() if s.rule == "random"} == {4, 8, 16, 32, 64, 128, 256}


def test_evaluate_of_an_autoregressive_run_is_its_exact_likelihood(
    scorer_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(evaluate.main, "--run", scorer_run)
    line, source = capsys.readouterr().out.splitlines()
    assert line.startswith("autoregressive: ") and line.count("±") == 2
    assert source == "on stories, valid split: 4 stories, exact likelihood"
    call(evaluate.main, "--run", scorer_run, "--json")
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["bits_per_byte"]["value"] < found["nats_per_token"]["value"] < math.log(300)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--samples", "{trained}"], 78, "--samples and --sweep need --scorer AR_RUN"),
        (["--scorer", "{scorer}"], 78, "--scorer and --count need --samples or --sweep"),
        (["--sweep", "--scorer", "{scorer}", "--count", 0], 78, "--count must be a number above 0, not 0"),
        (
            ["--samples", "{trained}", "--scorer", "{trained}"],
            78,
            "{trained} cannot score texts: it did not learn",
        ),
        (["--samples", "nowhere.txt", "--scorer", "{scorer}"], 65, "nowhere.txt does not exist"),
        (
            ["--sweep", "--run", "{scorer}", "--scorer", "{scorer}"],
            78,
            "{scorer} did not learn the objective canvas: a sweep",
        ),
        (["--sweep", "--json", "--scorer", "{scorer}"], 78, "--sweep measures a run, and prints one table"),
        (
            ["--samples", "{trained}", "--run", "{trained}", "--scorer", "{scorer}"],
            78,
            "--samples names what is scored: it cannot be combined with --run or --bundle",
        ),
        (["--samples", "{trained}", "--draws", 3, "--scorer", "{scorer}"], 78, "the number of samples is --count"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_score_refuses_what_cannot_be_scored(
    trained: Path, scorer_run: Path, capsys: pytest.CaptureFixture[str], flags: list[object], code: int, words: str
) -> None:
    names = {"trained": trained, "scorer": scorer_run}
    found, sentence = refusal(capsys, evaluate.main, *(str(flag).format(**names) for flag in flags))
    assert found == code
    assert words.format(**names) in sentence


def test_scorer_of_another_tokenizer_is_refused(
    trained: Path, scorer_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / TOKENIZER).write_text((run / TOKENIZER).read_text() + "\n")
    code, sentence = refusal(capsys, evaluate.main, "--samples", run, "--scorer", scorer_run)
    assert code == 65
    assert sentence.startswith(f"{scorer_run} cannot score these samples: its tokenizer is another one than ")


def test_scorer_without_its_tokenizer_is_refused(
    trained: Path, scorer_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer = tmp_path / "scorer"
    shutil.copytree(scorer_run, scorer)
    (scorer / TOKENIZER).unlink()
    code, sentence = refusal(capsys, evaluate.main, "--samples", trained, "--scorer", scorer)
    assert (code, sentence) == (
        65,
        f"{scorer / TOKENIZER} is missing, or not the tokenizer that the run was trained with",
    )
