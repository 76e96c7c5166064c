"""Captured graphs on disk, as text that nothing runs when it is read."""
