"""TensorRT on NVIDIA GPUs: engine building and cache, the CUDA driver, kernels, and the backend that runs the
captured loop.
"""
