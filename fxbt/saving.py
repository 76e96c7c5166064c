"""`save` and `load`: captured graphs in a folder, for use by other processes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from .errors import FxbtWarning, NotOptimizedError, callers_level
from .optimize import Model, dispatcher_of, dispatchers_in, optimized_with
from .options import Options
from .stored.errors import Unstorable
from .stored.files import Folder


def save(model: nn.Module, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes the captured graphs of an optimised model to a folder, so that `fxbt.load` need not capture them again.

    The files are text; loading them executes no code from them. They contain no weights: `load` is given the model. A
    file is valid for the same forward code, config, kinds of weights, versions and machine.

    Args:
        model: what `optimize` returned, after a call or `warmup` of each wanted kind.
        folder: created if needed; it may hold files of other models.

    Returns:
        The paths of the files, one per graph.

    Raises:
        NotOptimizedError: `model` is not optimised.
        ValueError: no graph is captured yet, or none can be written; the message says why.
        OSError: the folder cannot be written to.

    Example:
        >>> fast = fxbt.optimize(model, example_inputs)
        >>> fxbt.save(fast, "graphs")
    """
    if dispatcher_of(model) is None:
        raise NotOptimizedError(
            f"save() was given a {type(model).__name__} that is not optimised; pass what optimize() returned"
        )
    saved, obstacles = [], []
    for graph in [graph for dispatcher in dispatchers_in(model) for graph in dispatcher.graphs]:
        try:
            saved.append(graph.text.write(Folder(Path(folder))))
        except Unstorable as obstacle:
            obstacles.append(str(obstacle))
    if not saved:
        raise ValueError(
            f"save() wrote no graph: {'; '.join(obstacles) or 'none is captured yet; call the model first'}"
        )
    if obstacles:
        warnings.warn(f"graphs were not saved: {'; '.join(obstacles)}", FxbtWarning, stacklevel=callers_level())
    return saved


def load(folder: str | os.PathLike[str], model: Model, **options: Any) -> Model:
    """`fxbt.optimize(model, **options)`, using graphs written by `fxbt.save` instead of capturing.

    A graph is loaded at the first call of its kind and compared with the original on that call. A graph of another
    model, other code or other versions is refused, and the call is captured; `report.notes` says why.

    Raises:
        FileNotFoundError: there is no such folder.
        TypeError, ValueError: as `optimize` does.

    Example:
        >>> fast = fxbt.load("graphs", AutoModel.from_pretrained(name))
        >>> fast(**inputs)
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"load() was given {path}, which is not a folder; fxbt.save(fast, folder) creates one")
    example_inputs = options.pop("example_inputs", None)
    return optimized_with(model, Options(**options, folder=path.absolute()), example_inputs)
