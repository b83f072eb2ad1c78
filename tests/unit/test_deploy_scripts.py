"""The scripts of deploy/: what shellcheck says, and what they do before they touch anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
SCRIPTS = sorted(DEPLOY.glob("*.sh"))


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=60, env=dict(os.environ) | environment
    )


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_deploy_scripts_pass_shellcheck(script: Path) -> None:
    assert run("shellcheck", script).stdout == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_deploy_scripts_help_says_how(script: Path) -> None:
    assert os.access(script, os.X_OK)
    done = run(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: deploy/")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--frobnicate"], "unknown argument --frobnicate"),
        (["--uninstall", "--lan"], "--lan cannot be combined"),
        (["--uninstall", "--images"], "--images cannot be combined"),
        (["--purge"], "--purge needs"),
    ],
)
def test_installer_refuses_unknown_arguments(arguments: list[str], said: str) -> None:
    done = run(DEPLOY / "install.sh", *arguments)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {said}")


def test_installer_names_a_missing_python() -> None:
    done = run(DEPLOY / "install.sh", "--dry-run", PYTHON="no-such-python")
    assert done.returncode == 1 and "no-such-python is not installed" in done.stderr


def steps_of_a_dry_run(*flags: str) -> list[str]:
    python = "/usr/bin/python3"
    if not Path(python).exists() or run(python, "-c", "import ensurepip, venv").returncode:
        pytest.skip(f"{python} cannot make virtual environments")
    done = run(DEPLOY / "install.sh", "--dry-run", *flags, PYTHON=python)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("would run: ")]


@pytest.mark.parametrize(
    ("flags", "extras"),
    [((), ""), (("--http",), "web"), (("--images",), "images"), (("--http", "--images"), "images,web")],
)
def test_installer_asks_for_what_the_flags_need(flags: tuple[str, ...], extras: str) -> None:
    (installed,) = (step for step in steps_of_a_dry_run(*flags) if " pip install " in step)
    asked = installed.replace("\\", "").rpartition("edgelm-source")[2]
    assert asked == (f"[{extras}]" if extras else "")


def test_installer_dry_run_prints_every_step_and_does_none() -> None:
    steps = steps_of_a_dry_run()
    for step in (
        "-m venv /opt/edgelm/releases/",
        "groupadd --system edgelm",
        "systemctl enable",
        "edge.bundle install",
    ):
        assert any(step in line for line in steps), step


def test_push_bundle_refuses_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    done = run(DEPLOY / "push_bundle.sh", tmp_path, "nowhere.invalid")
    assert done.returncode == 66 and done.stderr == f"error: {tmp_path} is not a bundle: it has no manifest.json\n"
