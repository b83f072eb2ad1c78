"""The earlier name of `python -m host.baseline`."""

from host.experiments.baseline import main
from shared.errors import run_main

if __name__ == "__main__":
    run_main(main)
