"""Also optimises submodules of an optimised model that are called directly, as `generate` calls an encoder.

Nothing says in advance which ones are called. So an optimised model returns each submodule that itself has submodules
as an object of the same class that shares the submodule's `__dict__` and has graphs of its own. The original's forward
and graphs of the whole model never see these objects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .explain.report import Report

logger = logging.getLogger("fxbt")

_OWN_NAMES = ("report", "warmup")  # attributes that fxbt adds
_LAYERS = "torch.nn.modules."


class Submodels:
    """The optimised submodules of one optimised model; each gets a part of its `report`.

    Example:
        >>> submodels = Submodels(lambda part: optimized_with(part, options), fast.report)
        >>> submodels.of("encoder", model.encoder)  # the same object each time
    """

    def __init__(self, optimized: Callable[[nn.Module], Any], report: Report) -> None:
        self._optimized = optimized
        self._report = report
        self._made: dict[str, tuple[nn.Module, Any]] = {}

    def of(self, name: str, module: nn.Module) -> Any:
        """The optimised twin of the attribute `name`, a `module`; the module itself if it would never have a graph."""
        made = self._made.get(name)
        if made is not None and made[0] is module:
            return made[1]
        if not _may_have_graphs(module):
            return module
        try:
            part = self._optimized(module)
        except Exception as error:  # any class may be subclassed here
            logger.debug("the submodule %s runs unoptimised", name, exc_info=error)
            part = module
        else:
            self._report.own_parts[name] = part.report
        self._made[name] = module, part
        return part

    def all(self) -> Iterator[Any]:
        """The optimised submodules returned so far, and theirs."""
        for module, part in list(self._made.values()):
            if part is not module:
                yield part
                yield from type(part)._fxbt_submodels.all()

    def original(self, value: Any) -> Any:
        """The original of an optimised submodule; other values unchanged."""
        is_part = isinstance(value, nn.Module) and any(value is part for part in self.all())
        return type(value)._fxbt_dispatcher.original if is_part else value


def _may_have_graphs(module: nn.Module) -> bool:
    """Whether a module has a forward of its class and submodules, and is not a wrapper of torch's.

    One with parameters of its own stays as it is: torch's parametrizations change its class.
    """
    kind = type(module)
    if "forward" in vars(module) or next(module.parameters(recurse=False), None) is not None:
        return False
    is_wrapper = kind.__module__.partition(".")[0] == "torch" and not kind.__module__.startswith(_LAYERS)
    is_own = hasattr(kind, "_fxbt_dispatcher") or any(hasattr(module, name) for name in _OWN_NAMES)
    return kind.forward is not nn.Module.forward and any(module.children()) and not is_wrapper and not is_own
