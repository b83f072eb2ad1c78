"""`python -m tests.support.killed STORE OLD NEW`: installs a bundle over another, killed at each step that it takes.

Prints a line a kill: what it was about to do, what the links show then, and whether what is current is whole. Ends with
the first installation that comes to its end.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from edge.bundle import Service, install
from edge.config import Config
from edge.system.bundle_store import Store, check_files
from shared.errors import BundleError

CHANGES = frozenset(("open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "os.chmod"))


def kill_at(step: int, folder: Path, told: int) -> None:
    """Have this process killed before it changes something in `folder` for that many-th time, and say what it was."""
    steps = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal steps
        paths = [str(argument) for argument in arguments if isinstance(argument, (str, bytes, Path))]
        steps += event in CHANGES and any(str(folder) in path for path in paths)
        if steps == step:
            os.write(told, " ".join([event, *(Path(path).name for path in paths[:2])]).encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def main(folder: Path, old: Path, new: Path) -> None:
    """The loop."""
    service = Service(Config())  # of another store: nobody is told
    step = 0
    while True:
        step += 1
        shutil.rmtree(folder, ignore_errors=True)
        store = Store(folder)
        install(store, old, service=service, check=lambda staged: None)
        heard, told = os.pipe()
        if (child := os.fork()) == 0:
            kill_at(step, folder, told)
            install(store, new, service=service, check=lambda staged: None)
            os._exit(0)
        os.close(told)
        _, status = os.waitpid(child, 0)
        with os.fdopen(heard) as stream:
            before = stream.read()
        try:
            check_files(folder / "current")
            whole = True
        except BundleError:
            whole = False
        survived = status == 0
        links = store.links
        install(store, new, service=service, check=lambda staged: None)  # nothing stands in its way
        left = sorted(path.name for path in folder.iterdir())
        told_all = {"before": before, "current": links.current, "whole": whole, "left": left, "survived": survived}
        print(json.dumps(told_all))
        if survived:
            return


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
