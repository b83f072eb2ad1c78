"""`python -m host.model`: print the model sizes."""

from host.model.network import main
from shared.errors import run_main

if __name__ == "__main__":
    run_main(main)
