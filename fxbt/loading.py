"""`preload`: imports what a capture needs in a thread, while something else takes its time."""

from __future__ import annotations

import importlib
import os
import threading

# In the order they load; with the last come torch.export and what it needs, which no graph from disk does.
_NEEDED = ("torch_compat", "dispatch", "pipeline", "patterns", "capture.capture")


def preload() -> threading.Thread:
    """Imports in a thread what `optimize` and the first capture need, so that the first call does not wait for it.

    `import fxbt` alone imports none of that (torch.export, dynamo, sympy: about 1.5 s). Call this after importing the
    libraries that define the model, then load its weights meanwhile.

    Returns:
        The thread, a daemon; `join` it to wait. A failed import raises again where it is needed.

    Example:
        >>> fxbt.preload()
        >>> model = AutoModel.from_pretrained(name)
        >>> fast = fxbt.optimize(model)
    """
    thread = threading.Thread(target=_load, name="fxbt-preload", daemon=True)
    thread.start()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=thread.join)  # else a forked child would wait forever for half-imported modules
    return thread


def _load() -> None:
    for name in _NEEDED:
        importlib.import_module(f"{__package__}.{name}")
