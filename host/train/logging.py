"""What a person sees of a run while it trains: the CSV log, the progress bar, Weights & Biases."""

import contextlib
import csv
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from shared.errors import ConfigError, DiffusionLLMError

LOG_FILE = "log.csv"
MACHINE = "machine"
NUMBERS = ("step", "tokens", "seconds", "loss", "valid", "lr", "grad_norm", "tokens_per_s", "processor_s")
LOG_COLUMNS = (*NUMBERS, MACHINE)
UNNAMED = "a machine that an older version did not name"


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log; lines that a full disk or a crash spoilt do not count."""
    with path.open(newline="", errors="replace") as file:
        rows = csv.DictReader(line for line in file if line.endswith("\n") and "\0" not in line)
        return [row for row in rows if (row.get("step") or "").isdigit()]


def machines_of(log: list[dict[str, str]]) -> tuple[str, ...]:
    """Those that a run was trained on, the first process's of several."""
    return tuple(dict.fromkeys(row.get(MACHINE) or UNNAMED for row in log))


@contextlib.contextmanager
def open_log(path: Path, step: int, write: bool = True) -> Iterator[Callable[[tuple[object, ...]], None]]:
    """Append rows to the CSV log; each row is on disk at once.

    Rows behind `step`, which a crash left after the checkpoint that is resumed, are dropped first.
    Without `write`, as on all processes but the first, rows go nowhere.
    """
    if not write:
        yield lambda row: None
        return
    kept = [row for row in read_log(path) if int(row["step"]) <= step] if path.exists() else []
    partial = path.with_suffix(".partial")
    try:
        with partial.open("w", newline="") as file:
            csv.writer(file).writerows([LOG_COLUMNS, *([row.get(name) for name in LOG_COLUMNS] for row in kept)])
        partial.replace(path)
        with path.open("a", newline="") as file:
            writer = csv.writer(file)

            def log(row: tuple[object, ...]) -> None:
                writer.writerow(row)
                file.flush()

            yield log
    except OSError as error:  # of the log, or of a picture beside it
        partial.unlink(missing_ok=True)
        raise DiffusionLLMError(f"the run folder {path.parent} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def progress_bar(
    steps: int, seconds: float | None, shown: bool = True
) -> Iterator[Callable[[int, float, float, float | None, float], None]]:
    """A bar over steps, or over the seconds given, with loss, tokens a second and time left.

    Yields show(step, seconds, loss, validation loss or None, tokens a second).
    """
    total = steps if seconds is None else round(seconds)
    last_valid = "-"
    with tqdm(total=total, unit="step" if seconds is None else "s", dynamic_ncols=True, disable=not shown) as bar:

        def show(step: int, spent: float, loss: float, valid: float | None, tokens_per_s: float) -> None:
            nonlocal last_valid
            last_valid = last_valid if valid is None else f"{valid:.3f}"
            now = min(total, step if seconds is None else round(spent))
            if bar.n == 0 and now > 1:
                bar.initial = bar.n = now  # a resumed run: count its speed from here
            try:
                bar.set_postfix_str(f"loss {loss:.3f}, valid {last_valid}, {tokens_per_s:,.0f} tokens/s", refresh=False)
                bar.update(now - bar.n)
            except OSError:  # Ctrl-C ends a `tee` behind the bar, too; the run has yet to be saved
                bar.disable = True

        yield show


def start_wandb(name: str, settings: dict[str, float]) -> Callable[[dict[str, float]], None]:
    """Begin a Weights & Biases run; ConfigError when the package is missing."""
    try:
        import wandb
    except ImportError:
        raise ConfigError('--wandb needs its package: pip install "diffusion-llm[wandb]"') from None
    run = wandb.init(project="diffusion-llm", name=name, config=settings)
    return lambda row: run.log(row, step=int(row["step"]))
