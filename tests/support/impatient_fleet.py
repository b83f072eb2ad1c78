"""`python -m tests.support.impatient_fleet CONFIRM_S …`: `edgelm fleet` that waits so long for a device to serve."""

import sys

import edge.fleet.push as push
from edge.fleet.__main__ import main
from shared.errors import run_main

if __name__ == "__main__":
    push.CONFIRM_S = float(sys.argv.pop(1))  # type: ignore[misc]
    run_main(main)
