"""Decides which program serves a call."""
