"""The training host: data, model, training, sampling, evaluation, export. What serves a bundle is `edge`."""

import os
import sys
from importlib.util import find_spec

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: ONNX Runtime's wheels send telemetry by default
# Before torch is loaded: its threads wait for each other some 30 µs in a loop, then asleep. With OpenMP's default of
# milliseconds, on cores that others use too, most of the processor time was such waiting.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# argv[0] is "-m" while Python imports the module of `python -m host.…`: a command without its packages ends in one
# sentence. A program that imports the host gets Python's own error.
if sys.argv[:1] == ["-m"]:
    needed = ("torch", "datasets", "pyarrow", "safetensors", "onnx", "tqdm", "matplotlib")
    if missing := [name for name in needed if find_spec(name) is None]:
        remedy = "pip install 'diffusion-llm[host]', in a checkout pip install -e '.[host]' -c constraints.txt"
        sys.exit(f"error: the training host needs {', '.join(missing)}: {remedy}")
