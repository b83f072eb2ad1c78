"""`python -m host.ablate`: short paired runs that differ in one setting each."""

from host.experiments.ablate import main
from shared.errors import run_main

if __name__ == "__main__":
    run_main(main)
