"""Kernels of CPUs for the nodes of a graph."""
