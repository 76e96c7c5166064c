"""A model and a call become a graph."""
