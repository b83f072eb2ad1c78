"""`python -m host.evaluate`: measure a run or a bundle on held-out text."""

from host.evaluate.likelihood import main
from shared.errors import run_main

if __name__ == "__main__":
    run_main(main)
