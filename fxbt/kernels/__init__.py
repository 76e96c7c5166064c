"""Kernels: what a graph calls at run time."""
