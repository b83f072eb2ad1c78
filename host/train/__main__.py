"""`python -m host.train`: train a model."""

from host.train.trainer import main
from shared.errors import run_main

if __name__ == "__main__":
    run_main(main)
