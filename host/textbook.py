"""`python -m host.textbook`: train the baseline, the loop of a textbook."""

from host.experiments.baseline import main
from shared.errors import run_main

if __name__ == "__main__":
    run_main(main)
