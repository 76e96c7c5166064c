"""Captured graphs on disk, as text that is never executed."""
