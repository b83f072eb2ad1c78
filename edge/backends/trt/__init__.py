"""TensorRT on NVIDIA GPUs: engine building and cache, the CUDA driver, kernels, and the backends that run the
captured loops. Graphs for it are made, and checked, in `host.export`.
"""
