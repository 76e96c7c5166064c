"""Matching: finds a rule's formula in a graph."""
