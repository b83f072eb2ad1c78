"""`python -m edge`: the daemon."""

from edge.daemon import main
from shared.errors import run_main

if __name__ == "__main__":
    run_main(main)
