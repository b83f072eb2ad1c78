"""`python -m edge`: the daemon."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read as ONNX Runtime is imported: its wheels report usage

from edge.daemon import main
from shared.errors import run_main

if __name__ == "__main__":
    run_main(main)
