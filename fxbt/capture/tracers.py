"""The names of the tracers, and whether transformers' own one is there; what they need is loaded at a capture."""

from __future__ import annotations

import importlib.metadata
import importlib.util

TRACERS = ("auto", "export", "hf-fx")


def hf_fx_missing() -> str | None:
    """Why tracer="hf-fx" cannot be used here; None where it can."""
    try:
        from transformers.utils import fx as _  # noqa: F401
    except ImportError:
        if importlib.util.find_spec("transformers") is None:
            return 'tracer="hf-fx" needs transformers 4.x, which is not installed; use tracer="export"'
        version = importlib.metadata.version("transformers")
        return f'tracer="hf-fx" needs transformers.utils.fx, which transformers {version} does not have (4.x did); \
use tracer="export"'
    return None
