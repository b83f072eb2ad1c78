"""Processes of `torchrun -m host.train`, and what they exchange."""

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # the first process may have to prepare the data


@dataclass(frozen=True)
class Ranks:
    """This process among all; with one process every method returns its input."""

    rank: int = 0
    processes: int = 1

    @property
    def first(self) -> bool:
        """The one process that writes."""
        return self.rank == 0

    def sums(self, *values: float) -> list[float]:
        """Each value, summed over the processes."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, *values: float) -> list[float]:
        """Each value, the largest of the processes."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: tuple[float, ...], how: "dist.ReduceOp.RedOpType") -> list[float]:
        if self.processes == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, how)
        return list(tensor.tolist())

    def from_first(self, value: T | None) -> T:
        """The value of the first process."""
        box = [value]
        if self.processes > 1:
            dist.broadcast_object_list(box)
        assert box[0] is not None
        return box[0]


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes that torchrun started, each on a GPU of its own if there are any; alone without torchrun."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), processes)
    finally:
        dist.destroy_process_group()


def leave(ranks: Ranks) -> None:
    """End a process that torchrun started, with its exit functions but without unloading torch.

    Threads of its process group that still run then abort the interpreter ("terminate called without an active
    exception"), after all work is done, and torchrun reports a failure.
    """
    if ranks.processes > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
