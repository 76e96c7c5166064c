"""Kernels and recordings of CUDA devices."""
