"""What a joined run has gone through: the stages and the work of both runs, each once."""

from pathlib import Path

import pytest

from host import join
from host.train import trainer as train
from host.train.checkpoint import find_checkpoint, read_progress
from host.train.run_folder import training_stages, work_behind
from tests.support.commands import call, refusal


@pytest.fixture(scope="module")
def later(runs: tuple[Path, Path, Path], pictures: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two runs on top of the conditions, `pictures` and after it `reads`."""
    folder, before = tmp_path_factory.mktemp("later"), runs[2]
    for stage in ("pictures", "reads"):
        flags = ["--data", data, "--stage", stage, "--pictures", pictures, "--steps", 2, "--batch-size", 8]
        call(train.main, *flags, "--init", before, "--out", folder / stage)
        before = folder / stage
    return folder


@pytest.mark.slow
def test_join_keeps_the_stages_and_the_work_of_both_runs(
    runs: tuple[Path, Path, Path], later: Path, tmp_path: Path
) -> None:
    body, drafter, conditions = runs
    every = (body, drafter, conditions, later / "pictures", later / "reads")
    cost = [read_progress(find_checkpoint(run)) for run in every]
    for number, (one, other) in enumerate(((drafter, later / "reads"), (later / "reads", drafter))):
        out = tmp_path / f"both{number}"
        call(join.main, one, other, "--out", out)
        names = [stage.name for stage in training_stages(out)]
        assert sorted(names) == sorted(run.name for run in every) and names[0] == body.name
        assert [name for name in names if name != "drafter"] == [body.name, "conditions", "pictures", "reads"]
        work = work_behind(out)
        assert work.tokens == sum(stage.tokens for stage in training_stages(out)) == sum(p.tokens_seen for p in cost)
        assert work.compute_seconds == pytest.approx(sum(p.compute_seconds for p in cost))


@pytest.mark.slow
def test_join_counts_a_stage_once_when_a_joined_run_is_joined_again(
    runs: tuple[Path, Path, Path], later: Path, tmp_path: Path
) -> None:
    _, drafter, conditions = runs
    both, out = tmp_path / "both", tmp_path / "all"
    call(join.main, conditions, drafter, "--out", both)
    call(join.main, both, later / "pictures", "--out", out)
    assert [stage.name for stage in training_stages(out)] == ["a", "conditions", "drafter", "pictures"]
    cost = [read_progress(find_checkpoint(run)) for run in (*runs, later / "pictures")]
    assert work_behind(out).compute_seconds == pytest.approx(sum(p.compute_seconds for p in cost))


@pytest.mark.slow
def test_join_says_that_one_run_goes_on_from_the_other(
    runs: tuple[Path, Path, Path], later: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = runs[2], later / "reads"
    sentence = f"{second} goes on from {first} already, and has all that it has: there is nothing to join"
    for pair in ((first, second), (second, first)):
        assert refusal(capsys, join.main, *pair, "--out", tmp_path / "x")[1] == sentence


@pytest.mark.slow
def test_join_of_two_runs_that_trained_the_same_part_names_it(
    runs: tuple[Path, Path, Path],
    later: Path,
    pictures: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever their last stages are: the other's part would be lost without a word."""
    again = tmp_path / "again"
    flags = ["--data", data, "--stage", "pictures", "--pictures", pictures, "--steps", 2, "--batch-size", 8]
    call(train.main, *flags, "--seed", 9, "--init", runs[2], "--out", again)
    for one, other in ((again, later / "reads"), (later / "reads", again)):
        said = refusal(capsys, join.main, one, other, "--out", tmp_path / "x")[1]
        assert f"{one} and {other} have both trained pictures, and one of them would be lost" in said
        assert not (tmp_path / "x").exists()
