"""Triton kernels for Hopper GPUs. Imported on first use with CUDA tensors: machines without a GPU need no triton."""
