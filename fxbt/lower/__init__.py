"""A rewritten graph becomes a callable."""
