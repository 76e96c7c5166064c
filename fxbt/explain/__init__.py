"""Explains what was done, what was not done, and why."""
