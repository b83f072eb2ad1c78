"""`python -m host.ablate`: equal budgets, one difference each, one table."""

import json
from pathlib import Path

import pytest

from host.experiments import ablate
from host.experiments.ablate import Row, print_table, variants
from host.train import trainer as train
from host.train.checkpoint import LAST, read_progress
from host.train.run_folder import CONFIG_FILE, read_config
from shared.errors import DiffusionLLMError
from tests.support.commands import call, refusal


def test_ablate_variants_change_one_thing_each() -> None:
    found = variants([])
    assert found.pop("defaults") == []
    assert all(sum(flag.startswith("--") for flag in flags) == 1 for flags in found.values())


@pytest.mark.parametrize(
    ("common", "rate"),
    [
        ([], "0.008"),
        (["--optimizer", "adamw"], "0.002"),
        (["--lr=0.03"], "0.06"),
        (["--optimizer", "adamw", "--lr", "0.03"], "0.06"),
    ],
)
def test_ablate_twice_the_rate_is_twice_that_of_the_other_variants(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], common: list[str], rate: str
) -> None:
    """Theirs is 0.004 with Muon and 0.001 with AdamW, where nobody says another."""
    monkeypatch.setattr(ablate, "measure", lambda name, flags, **_: Row(name, [1.0], [1.0], 1.0, " ".join(flags)))
    call(ablate.main, "--steps", 3, "--only", "twice the rate", "--", *common)
    assert (
        capsys.readouterr().out.splitlines()[-1].endswith(f" | `{' '.join([*common, '--lr', rate, '--steps', '3'])}` |")
    )


@pytest.mark.slow
def test_ablate_trains_measures_and_continues_two_variants(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def table(steps: int) -> list[list[str]]:
        capfd.readouterr()
        call(
            ablate.main,
            *("--steps", steps, "--only", "AdamW", "NELBO weighting", "--stories", 4, "--out", tmp_path),
            *("--", "--config", "debug", "--data", data, "--batch-size", 8),
        )
        lines = capfd.readouterr().out.splitlines()
        assert sum(line.startswith("$ python -m host.train ") for line in lines) == 2
        return [line.split(" | ") for line in lines if line.startswith("| ")]

    head, rule, adamw, nelbo = table(3)
    assert head[0] == "| variant" and set(rule[0]) <= set("| -")
    assert (adamw[0], nelbo[0]) == ("| AdamW", "| NELBO weighting")
    assert (
        f"`python -m host.train --config debug --data {data} --batch-size 8 --weighting nelbo --steps 3` |" == nelbo[-1]
    )
    assert adamw[3] == nelbo[3]  # as many tokens
    assert all(float(cell) > 0 for row in (adamw, nelbo) for cell in row[1:3])
    assert adamw[1] != adamw[2]  # EMA weights are not the raw ones
    assert read_config(tmp_path / "nelbo-weighting-0").weighting == "nelbo"
    assert read_progress(tmp_path / "adamw-0" / LAST).step == 3
    assert table(3)[2:] == [adamw, nelbo]  # what is there is measured again, not trained again


def test_ablate_refuses_a_run_that_other_flags_made(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["--config", "debug", "--data", str(data), "--batch-size", "8"]
    run = tmp_path / "defaults-0"
    call(train.main, *shared, "--steps", 2, "--out", run)
    again = ablate.train_command(run, 0, [*shared, "--steps", "2"])
    assert again == ["-m", "host.train", "--resume", str(run)]
    flags = ["--only", "defaults", "--out", tmp_path]
    for length, common, words in (
        (3, [], "steps 2 instead of 3"),
        (2, ["--lr", "0.1"], "lr 0.004 instead of 0.1"),
        (2, ["--schedule", "cosine"], "schedule linear instead of cosine"),
    ):
        code, sentence = refusal(capsys, ablate.main, "--steps", length, *flags, "--", *shared, *common)
        assert (code, sentence) == (78, f"{run} was trained with {words}: choose another --out")


def test_ablate_refuses_a_run_that_was_stopped(data: Path, tmp_path: Path) -> None:
    """A run that gets a signal by itself saves, and ends as if all were well."""
    run = tmp_path / "run"
    call(train.main, "--config", "debug", "--data", data, "--batch-size", 8, "--steps", 2, "--out", run)
    config = json.loads((run / CONFIG_FILE).read_text())
    (run / CONFIG_FILE).write_text(json.dumps(config | {"steps": 3}))
    with pytest.raises(DiffusionLLMError, match="was stopped before its end; the same command goes on with it"):
        ablate.train(run, ["-c", "pass"])


def test_ablate_shows_seeds_as_mean_and_spread(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([Row("a", [1.0, 2.0], [3.0, 3.0], 0.5, "c")])
    assert capsys.readouterr().out.splitlines()[-1] == "| a | 1.5000 ± 0.7071 | 3.0000 ± 0.0000 | 0.50 | `c` |"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--steps", 3, "--only", "magic"], 78, "--only: no variant is called 'magic': choose among defaults, AdamW"),
        (["--steps", 3, "--", "--objectives", "ar"], 78, "--objectives must hold canvas"),
        (["--steps", 3, "--stories", 0], 78, "--stories must be at least 1, not 0"),
        (["--steps", 3, "--seeds", 0, 1, 0], 78, "--seeds names 0 twice: a seed again makes the same run again"),
        (["--steps", 3, "--", "--data", "nowhere"], 1, "defaults-0 failed; its own message stands above"),
    ],
)
def test_ablate_refuses_what_cannot_be_compared(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[object],
    code: int,
    words: str,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[4]))
    monkeypatch.chdir(tmp_path)
    found, sentence = refusal(capsys, ablate.main, *flags)
    assert found == code
    assert words in sentence
