"""`python -m host.data`: prepare training data."""

from host.data.prepare import main
from shared.errors import run_main

if __name__ == "__main__":
    run_main(main)
