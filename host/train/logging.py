"""Reports of a run while it trains: the CSV log, the progress bar, Weights & Biases."""

import contextlib
import csv
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from host.progress import progress
from shared.errors import ConfigError, DiffusionLLMError

LOG_FILE = "log.csv"


@dataclass(frozen=True)
class LogRow:
    """One optimizer step. tokens, seconds, compute_s: so far; valid: None between validations; losses in nats.

    gflops: speed of the model's matrix products, work on padding not counted; mfu: of the peak, on CUDA; memory_mb: the
    most so far.
    """

    step: int
    tokens: int
    seconds: float
    loss: float
    valid: float | None
    lr: float
    grad_norm: float
    tokens_per_s: float
    compute_s: float
    gflops: float | None = None
    mfu: float | None = None
    memory_mb: float | None = None


LOG_COLUMNS = tuple(field.name for field in fields(LogRow))
FORMATS = dict(
    zip(LOG_COLUMNS, ("d", "d", ".1f", ".4f", ".4f", ".2e", ".3f", ".0f", ".1f", ".1f", ".3f", ".0f"), strict=True)
)


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log, without lines that a full disk or a crash cut off."""
    with path.open(newline="", errors="replace") as file:
        rows = csv.DictReader(line for line in file if line.endswith("\n") and "\0" not in line)
        return [row for row in rows if (row.get("step") or "").isdigit()]


@contextlib.contextmanager
def open_log(path: Path, step: int, write: bool = True) -> Iterator[Callable[[LogRow], None]]:
    """Append rows to the CSV log; each row is on disk at once.

    Rows after `step`, which a crash left after the checkpoint that is resumed, are dropped first.
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

            def log(row: LogRow) -> None:
                cells = asdict(row).items()
                writer.writerow("" if value is None else format(value, FORMATS[name]) for name, value in cells)
                file.flush()

            yield log
    except OSError as error:  # of the log, or of a picture beside it
        partial.unlink(missing_ok=True)
        raise DiffusionLLMError(f"the run folder {path.parent} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def progress_bar(steps: int, minutes: float | None, visible: bool = True) -> Iterator[Callable[[LogRow], None]]:
    """Progress in steps, or in the minutes given, with loss, tokens/s and time left."""
    numbers = "{n_fmt}/{total_fmt} steps" if minutes is None else "{n:.1f}/{total:g} min"
    layout = "{percentage:3.0f}%|{bar}| " + numbers + " [{elapsed}<{remaining}{postfix}]"
    valid_shown = ""
    with progress(total=steps if minutes is None else minutes, bar_format=layout, disable=not visible) as bar:

        def show(row: LogRow) -> None:
            nonlocal valid_shown
            valid_shown = valid_shown if row.valid is None else f", validation {row.valid:.3f}"
            now = row.step if minutes is None else min(minutes, row.seconds / 60)
            if bar.n == 0 and row.step > 1:
                bar.initial = bar.n = bar.last_print_n = now  # a resumed run: count its speed from here
            counted = "" if minutes is None else f"step {row.step:,}, "
            shown = f"{counted}loss {row.loss:.3f}{valid_shown}, {row.tokens_per_s:,.0f} tokens/s"
            try:
                bar.set_postfix_str(shown, refresh=False)
                bar.update(now - bar.n)
            except OSError:  # Ctrl-C also ended the `tee` that reads the bar; the run must still be saved
                bar.disable = True

        yield show


def start_wandb(name: str, settings: dict[str, float]) -> Callable[[LogRow], None]:
    """Begin a Weights & Biases run; ConfigError when the package is missing."""
    try:
        import wandb
    except ImportError:
        raise ConfigError('--wandb needs its package: pip install "diffusion-llm[wandb]"') from None
    run = wandb.init(project="diffusion-llm", name=name, config=settings)
    return lambda row: run.log({name: value for name, value in asdict(row).items() if value is not None}, step=row.step)
