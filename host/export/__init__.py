"""From a trained network to the bundle that ships: graphs, quantization, parity gates, lint, manifest. Decoding
belongs to `edge.decoding`.
"""
