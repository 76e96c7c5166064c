"""`save` and `load`: captured graphs in a folder, for other processes."""

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
    """Writes the graphs that were captured of an optimised model, so that `fxbt.load` need not capture them.

    The files are text that nothing runs when it is read. Weights are not in them: `load` is given the model. They hold
    for the same code of the forward, config, kinds of weights, versions and machine.

    Args:
        model: what `optimize` returned, after calls or `warmup` of the kinds that are wanted.
        folder: made if it is not there; files of other models may be in it.

    Returns:
        The files, one for each graph.

    Raises:
        NotOptimizedError: `model` is not optimised.
        ValueError: there is no graph yet, or none that can be written; the message says why.
        OSError: nothing can be written.

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
            f"save() wrote no graph: {'; '.join(obstacles) or 'none is captured yet, call the model first'}"
        )
    if obstacles:
        warnings.warn(f"graphs were not saved: {'; '.join(obstacles)}", FxbtWarning, stacklevel=callers_level())
    return saved


def load(folder: str | os.PathLike[str], model: Model, **options: Any) -> Model:
    """`fxbt.optimize(model, **options)`, with the graphs that `fxbt.save` wrote in place of captures.

    Each is looked at when a call of its kind comes for the first time, and compared with the original on that call. One
    that is of another model, of other code or versions is refused, and the call is captured: `report.notes` says why.

    Raises:
        FileNotFoundError: there is no such folder.
        TypeError, ValueError: as `optimize` does.

    Example:
        >>> fast = fxbt.load("graphs", AutoModel.from_pretrained(name))
        >>> fast(**inputs)
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"load() was given {path}, which is no folder; fxbt.save(fast, folder) makes one")
    example_inputs = options.pop("example_inputs", None)
    return optimized_with(model, Options(**options, folder=path.absolute()), example_inputs)
