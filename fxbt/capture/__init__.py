"""Capture: turns a model and a call into a graph."""
