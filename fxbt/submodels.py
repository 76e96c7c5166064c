"""Submodules of an optimised model that are called by themselves, as `generate` calls an encoder: optimised too.

Which they are shows when somebody calls one: an optimised model hands out each of its submodules that has submodules
itself as an object of the same class that shares the submodule's `__dict__` and has graphs of its own. The original's
forward, and graphs of the whole, never meet these objects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .explain.report import Report

logger = logging.getLogger("fxbt")

_OWN_NAMES = ("report", "warmup")  # of an optimised model
_LAYERS = "torch.nn.modules."


class Submodels:
    """The submodules of one optimised model, as it hands them out; `report` gets a part for each.

    Example:
        >>> submodels = Submodels(lambda part: optimized_with(part, options), fast.report)
        >>> submodels.of("encoder", model.encoder)  # the same object each time
    """

    def __init__(self, optimized: Callable[[nn.Module], Any], report: Report) -> None:
        self._optimized = optimized
        self._report = report
        self._made: dict[str, tuple[nn.Module, Any]] = {}

    def of(self, name: str, module: nn.Module) -> Any:
        """What stands for the attribute `name`, which holds `module`: itself, where it would never have a graph."""
        made = self._made.get(name)
        if made is not None and made[0] is module:
            return made[1]
        if not _may_have_graphs(module):
            return module
        try:
            part = self._optimized(module)
        except Exception as error:  # classes of anyone's making are subclassed here
            logger.debug("the submodule %s is called as it is", name, exc_info=error)
            part = module
        else:
            self._report.own_parts[name] = part.report
        self._made[name] = module, part
        return part

    def all(self) -> Iterator[Any]:
        """What was handed out, with what that handed out itself."""
        for module, part in list(self._made.values()):
            if part is not module:
                yield part
                yield from type(part)._fxbt_submodels.all()

    def original(self, value: Any) -> Any:
        """The submodule that something handed out stands for; other values as they are."""
        is_part = isinstance(value, nn.Module) and any(value is part for part in self.all())
        return type(value)._fxbt_dispatcher.original if is_part else value


def _may_have_graphs(module: nn.Module) -> bool:
    """Whether a module can be called, is more than one layer, and is none of torch's that wrap others."""
    kind = type(module)
    is_wrapper = kind.__module__.partition(".")[0] == "torch" and not kind.__module__.startswith(_LAYERS)
    is_own = hasattr(kind, "_fxbt_dispatcher") or any(hasattr(module, name) for name in _OWN_NAMES)
    return kind.forward is not nn.Module.forward and any(module.children()) and not is_wrapper and not is_own
