"""Beginning a run from the command line, in one process or in several."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from host.train.arguments import parse_arguments
from host.train.checkpoint import Progress
from host.train.distributed import Ranks
from host.train.run_folder import TrainConfig, run_laid_out
from shared.errors import DiffusionLLMError


@contextlib.contextmanager
def laid_out_by_first(ranks: Ranks) -> Iterator[tuple[argparse.Namespace, TrainConfig, Progress]]:
    """The first process reads the command line and lays out the run. If it fails, it says why; the others just exit."""
    with contextlib.ExitStack() as held:
        planned: tuple[argparse.Namespace, TrainConfig, Progress] | DiffusionLLMError | SystemExit | None = None
        if ranks.first:
            try:
                args = parse_arguments()
                planned = (args, *held.enter_context(run_laid_out(args, ranks.processes)))
            except (DiffusionLLMError, SystemExit) as error:  # argparse exits by itself
                planned = error
        plan: Any = ranks.from_first(planned)
        if isinstance(plan, BaseException):
            raise plan if ranks.first else SystemExit(1)
        yield plan
