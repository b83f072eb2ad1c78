"""The edge: a lean daemon that serves a bundle, and its commands. Decoding loops are in `edge.decoding`, runtimes in
`edge.backends`. Imports neither torch nor onnx, and nothing of `host`, which trains and exports.
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read as ONNX Runtime is imported: its wheels report usage
