"""Formulas are found in a graph."""
