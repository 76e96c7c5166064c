"""CPU kernels for the nodes of a graph."""
