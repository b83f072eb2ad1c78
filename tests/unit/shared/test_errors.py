"""How a command line ends: one sentence and an exit code, never a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import (
    ERROR_CODES,
    BundleError,
    ConfigError,
    DataError,
    DiffusionLLMError,
    RequestError,
    run_main,
)

ROOT = Path(__file__).resolve().parents[3]


def exit_code(error: BaseException | None, status: int | None = None) -> object:
    """What run_main leaves with when `main` raises an error, or returns a status."""

    def main() -> int | None:
        if error is not None:
            raise error
        return status

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    return caught.value.code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DiffusionLLMError("so it is"), 1),
        (DataError("so it is"), 65),
        (BundleError("so it is"), 66),
        (ConfigError("so it is"), 78),
        (RequestError("timeout", "so it is"), 1),
    ],
)
def test_run_main_prints_a_users_mistake_as_one_line(
    error: DiffusionLLMError, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(error) == code
    assert capfd.readouterr() == ("", "error: so it is\n")


def test_run_main_prints_no_traceback_at_ctrl_c(capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code(KeyboardInterrupt()) == 130
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("status", [None, 0, 3])
def test_run_main_exits_with_the_status_of_main(status: int | None) -> None:
    assert exit_code(None, status) == status


def test_run_main_keeps_the_traceback_of_a_bug() -> None:
    def main() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_main(main)


@pytest.mark.parametrize("lines", [1, 10_000], ids=["in the buffer", "beyond the buffer"])
def test_run_main_takes_a_closed_pipe_as_success(lines: int) -> None:
    """As in `python -m edge.generate … | head -0`."""
    script = f"from shared.errors import run_main\nrun_main(lambda: print('word\\n' * {lines}))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=environment,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("code", ERROR_CODES)
def test_request_error_knows_whether_to_retry(code: str) -> None:
    error = RequestError(code, "because")
    assert (error.code, str(error), error.retry_after_ms) == (code, "because", None)
    assert error.retryable == (code in {"broker_lost", "too_slow", "queue_full", "draining", "storage_full"})


def test_request_error_of_an_unknown_code_is_a_bug() -> None:
    with pytest.raises(KeyError):
        RequestError("oops", "because")


@pytest.mark.parametrize(
    "error", [BundleError("it says 'a\nb\x1b[2J'"), RequestError("internal", "it says 'a\nb\x1b[2J'")]
)
def test_errors_one_line_cannot_steer_a_terminal(error: DiffusionLLMError) -> None:
    assert str(error) == r"it says 'a\nb\x1b[2J'"


def test_errors_one_line_cuts_long_text() -> None:
    assert len(str(RequestError("bad_request", "x" * 60_000))) < 1100
