"""`python -m host.baseline`: train the baseline that `host.compare` sets beside a run."""

from host.experiments.baseline import main
from shared.errors import run_main

if __name__ == "__main__":
    run_main(main)
