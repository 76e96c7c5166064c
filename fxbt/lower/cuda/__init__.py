"""Kernels and recordings for CUDA devices."""
