"""Rewriting: replaces what rules found, and checks the values."""
