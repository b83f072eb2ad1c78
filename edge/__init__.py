"""The edge: a lean daemon that runs a bundle's unmasking loop. Imports neither torch nor onnx."""
