"""`python -m tests.support.small_journal MAX_BYTES KEEP_S …`: the daemon with other bounds of its journal."""

import sys

import edge.delivery.journal as journal
from edge.daemon import main
from shared.errors import run_main

if __name__ == "__main__":
    journal.MAX_BYTES, journal.KEEP_S = int(sys.argv.pop(1)), float(sys.argv.pop(1))  # type: ignore[misc]
    run_main(main)
