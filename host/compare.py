"""`python -m host.compare`: runs side by side at equal CPU-hours."""

from host.experiments.compare import main
from shared.errors import run_main

if __name__ == "__main__":
    run_main(main)
