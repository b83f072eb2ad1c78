"""`python -m host.generate`: the reference sampler on the command line."""

from pathlib import Path

import pytest

from host import generate
from host.train import trainer as train
from tests.support.commands import call, refusal


def test_generate_gives_a_seed_s_text_again(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        call(generate.main, "the", "--run", trained, "--seed", 1, 2, "--steps", 4)
        printed = capsys.readouterr().out
        assert printed.count("denoising steps") == 2
        texts.append([line for line in printed.splitlines() if not line.startswith("—")])
    assert texts[0] == texts[1]
    assert texts[0][0].startswith("the")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--steps", 0], "`steps`"),
        (["--temperature", "nan"], "`temperature` must be a number, not nan"),
        (["--top-p", 2], "`top_p`"),
        (["--max-tokens", -5], "`max_tokens`"),
        (["--seed", 10**23], "`seed`"),
    ],
)
def test_generate_refuses_what_no_request_may_say(
    trained: Path, capsys: pytest.CaptureFixture[str], flags: list[object], named: str
) -> None:
    code, sentence = refusal(capsys, generate.main, "the", "--run", trained, *flags)
    assert code == 1
    assert named in sentence


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--word", "cake"], "takes neither words nor pictures: train it with host.train --stage conditions"),
        (["--image", "cake.png"], "takes neither words nor pictures"),
        (["--guidance", 1], "--guidance is about --word and --image"),
        (["--guidance", 6, "--word", "cake"], "--guidance must be from 0 to 5"),
    ],
)
def test_generate_refuses_conditions_of_a_run_without_them(
    trained: Path, capsys: pytest.CaptureFixture[str], flags: list[object], named: str
) -> None:
    assert named in refusal(capsys, generate.main, "the", "--run", trained, *flags)[1]


def test_generate_refuses_a_prompt_that_is_not_text(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not UTF-8" in refusal(capsys, generate.main, "caf\udce9", "--run", trained)[1]


@pytest.mark.slow
def test_generate_of_an_autoregressive_run_goes_token_by_token(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "ar"
    call(
        train.main,
        *("--config", "debug", "--data", data, "--out", run, "--objectives", "ar", "--steps", 2, "--batch-size", 8),
    )
    printed = []
    for prompt in ("the", "the", ""):
        capsys.readouterr()
        call(generate.main, prompt, "--run", run, "--seed", 3)
        printed.append(capsys.readouterr().out.rpartition(",")[0])  # without the seconds
    assert printed[0] == printed[1] != printed[2]
    assert printed[0].startswith("the") and " tokens in " in printed[0].splitlines()[-1]
    assert "--steps is for a canvas" in refusal(capsys, generate.main, "the", "--run", run, "--steps", 7)[1]


def test_generate_of_a_joint_run_writes_or_fills_a_canvas(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "joint"
    call(
        train.main,
        *("--config", "debug", "--data", data, "--out", run, "--objectives", "ar,canvas", "--steps", 2),
        *("--batch-size", 8),
    )
    capsys.readouterr()
    call(generate.main, "the", "--run", run)
    assert " passes, " in capsys.readouterr().out
    call(generate.main, "the", "--run", run, "--steps", 3)
    assert " denoising steps, " in capsys.readouterr().out
