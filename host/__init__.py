"""The training host: data, model, diffusion, training, evaluation, export."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime's wheels report home unless told before the import
