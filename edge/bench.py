"""`python -m edge.bench`: how fast a bundle runs on this machine."""

from edge.measure.bench import main
from shared.errors import run_main

if __name__ == "__main__":
    run_main(main)
