"""The edge: a lean daemon that serves a bundle, and its commands. The loops are in `edge.decoding`, what runs the
graphs in `edge.backends`. Imports neither torch, onnx nor `host`: training and export are there.
"""
