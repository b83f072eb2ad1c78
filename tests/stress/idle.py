"""Start time and memory of a daemon that nobody asks anything: `python -m tests.stress.idle TREE [TREE …]`.

A TREE is a checkout and its bundle, `TREE+http` the same with HTTP on. They take turns: no machine is always as fast.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.errors import run_main
from tests.integration.harness import clean_environment

SETTLE_S: Final = 1.0
HTTP: Final = "+http"


@dataclass(frozen=True)
class Idle:
    """cpu_ms: of the process, until it was idle. ready_ms: from the start of the process to its first line.

    ports: TCP sockets that listen.
    """

    ready_ms: float
    cpu_ms: float
    resident_kb: int
    threads: int
    ports: int


def look(tree: str) -> Idle:
    """One daemon of a checkout, from its start to its end."""
    checkout, http = tree.removesuffix(HTTP), tree.endswith(HTTP)
    with tempfile.TemporaryDirectory(prefix="idle-") as folder:
        flags = ["--socket", f"{folder}/s", *(["--http", "127.0.0.1:0"] if http else [])]
        environment = clean_environment(STATE=folder, THREADS="1") | {"PYTHONPATH": str(Path(checkout).resolve())}
        began_s = time.monotonic()
        daemon = subprocess.Popen(
            [sys.executable, "-m", "edge", *flags],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert daemon.stdout is not None
            line = daemon.stdout.readline()
            ready_ms = (time.monotonic() - began_s) * 1e3
            assert line.startswith("ready in "), tree
            time.sleep(SETTLE_S)
            proc = Path(f"/proc/{daemon.pid}")
            status = proc.joinpath("status").read_text()
            ticks = proc.joinpath("stat").read_text().rpartition(")")[2].split()[11:13]
            return Idle(
                ready_ms=ready_ms,
                cpu_ms=sum(map(int, ticks)) * 1e3 / os.sysconf("SC_CLK_TCK"),
                resident_kb=int(re.findall(r"VmRSS:\s+(\d+)", status)[0]),
                threads=int(re.findall(r"Threads:\s+(\d+)", status)[0]),
                ports=listening(proc),
            )
        finally:
            daemon.terminate()
            daemon.communicate()


def listening(proc: Path) -> int:
    """TCP sockets of a process that take connections."""
    own = {str(link.readlink()) for link in proc.joinpath("fd").iterdir() if link.is_symlink()}
    tables = [proc.joinpath("net", name).read_text() for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table.splitlines()[1:]]
    return sum(row[3] == "0A" and f"socket:[{row[9]}]" in own for row in rows)


def middle(values: list[float]) -> str:
    """Median ± its standard error, from the spread of normal values."""
    error = 1.2533 * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.median(values):.1f} ± {error:.1f}"


def main() -> int:
    """Look at each tree in turn, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.idle", description=__doc__)
    parser.add_argument("trees", nargs="+", metavar="TREE")
    parser.add_argument("--runs", type=int, default=9, metavar="N")
    args = parser.parse_args()
    seen: dict[str, list[Idle]] = {tree: [] for tree in args.trees}
    for _ in range(args.runs):
        for tree in args.trees:
            seen[tree].append(look(tree))
    columns: dict[str, Callable[[Idle], float]] = {
        "ready, ms": lambda idle: idle.ready_ms,
        "CPU, ms": lambda idle: idle.cpu_ms,
        "resident, MB": lambda idle: idle.resident_kb * 1024 / 1e6,
    }
    print("| tree |", " | ".join(columns), "| threads | ports |")
    for tree, idles in seen.items():
        cells = [middle([of(idle) for idle in idles]) for of in columns.values()]
        counts = [sorted({idle.threads for idle in idles}), sorted({idle.ports for idle in idles})]
        print("|", tree, "|", " | ".join([*cells, *(", ".join(map(str, count)) for count in counts)]), "|", flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
