"""Lowering: turns a rewritten graph into a callable."""
