"""Process-wide settings and random generators that a forward may read or change, and that a graph does not.

A seed, a default dtype, a number of threads: what Python sets during a forward is not set by its graph. Comparison
finds lasting changes; recording calls finds a setting that is set to its current value.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import CaptureError
from ..torch_compat import PRINT_OPTS, count_of_function_modes

_TORCH = Path(torch.__file__).parent
_MAIN = str(_TORCH / "__init__.py")
_BACKENDS = str(_TORCH / "backends")
_GENERATORS = str(_TORCH / "random.py"), *(str(_TORCH / kind / "random.py") for kind in ("cuda", "xpu", "mtia"))
_PRINTING = str(_TORCH / "_tensor_str.py")
_FILES = str(_TORCH / "serialization.py")
_SETTERS = ("set_", "use_deterministic", "enable_", "__set__")

_GETTERS: dict[str, Callable[[], Any]] = {
    "torch.get_num_threads()": torch.get_num_threads,
    "torch.get_num_interop_threads()": torch.get_num_interop_threads,
    "torch.get_default_dtype()": torch.get_default_dtype,
    "torch.is_grad_enabled()": torch.is_grad_enabled,
    "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled,
    "torch.is_autocast_enabled('cpu')": lambda: torch.is_autocast_enabled("cpu"),
    "torch.get_autocast_dtype('cpu')": lambda: torch.get_autocast_dtype("cpu"),
    "torch.is_autocast_enabled('cuda')": lambda: torch.is_autocast_enabled("cuda"),
    "torch.get_autocast_dtype('cuda')": lambda: torch.get_autocast_dtype("cuda"),
    "torch.is_autocast_cache_enabled()": torch.is_autocast_cache_enabled,
    "torch.is_anomaly_enabled()": torch.is_anomaly_enabled,
    "torch.is_warn_always_enabled()": torch.is_warn_always_enabled,
    "torch.get_deterministic_debug_mode()": torch.get_deterministic_debug_mode,
    "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision,
    "torch.backends.cudnn.enabled": lambda: torch.backends.cudnn.enabled,
    "torch.backends.cudnn.benchmark": lambda: torch.backends.cudnn.benchmark,
    "torch.backends.cudnn.deterministic": lambda: torch.backends.cudnn.deterministic,
    "torch.backends.cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
    "torch.backends.cuda.flash_sdp_enabled()": torch.backends.cuda.flash_sdp_enabled,
    "torch.backends.cuda.mem_efficient_sdp_enabled()": torch.backends.cuda.mem_efficient_sdp_enabled,
    "torch.backends.cuda.math_sdp_enabled()": torch.backends.cuda.math_sdp_enabled,
    "torch's modes (a default device is one)": count_of_function_modes,
    "torch.set_printoptions": lambda: dict(vars(PRINT_OPTS)),
    "numpy.geterr()": lambda: _numpy("numpy", "geterr"),
    "gc.isenabled()": gc.isenabled,
    "sys.getrecursionlimit()": sys.getrecursionlimit,
    "os.getcwd()": lambda: os.getcwd() if os.path.exists(".") else None,
}
_ASKED_OF_C = frozenset(
    [
        *(torch.get_num_threads, torch.get_num_interop_threads, torch.is_anomaly_enabled),
        *(torch.is_autocast_cache_enabled, gc.isenabled, sys.getrecursionlimit, os.getcwd),
    ]
)
_SET_IN_C = frozenset([torch.set_num_threads, torch.set_num_interop_threads, torch.set_flush_denormal])
_GENERATORS_READ = ("get_state", "graphsafe_get_state", "initial_seed", "get_offset")


class Settings:
    """All settings as they are now.

    Example:
        >>> settings = Settings()
        >>> torch.set_num_threads(3)
        >>> settings.changed()
        ['torch.get_num_threads()']
    """

    def __init__(self) -> None:
        self._values = {name: get() for name, get in _GETTERS.items()}
        self._filters = list(warnings.filters)
        self._modules = len(sys.modules)

    @property
    def values(self) -> dict[str, Any]:
        """Their values at the snapshot, by name."""
        return dict(self._values)

    def changed(self) -> list[str]:
        """The names of settings that differ now. A module imported since may add its own warning filters."""
        differing = [name for name, get in _GETTERS.items() if get() != self._values[name]]
        if len(sys.modules) == self._modules and list(warnings.filters) != self._filters:
            differing.append("warnings.filters")
        return differing

    def holds(self) -> bool:
        """Whether all settings are as they were; warning filters are not included."""
        return all(get() == self._values[name] for name, get in _GETTERS.items())


def foreign_to_graphs(code: types.CodeType) -> str | None:
    """What a forward calls through this torch function, if a graph would not do it: generators, settings, files."""
    file, name = code.co_filename, code.co_name
    if file in _GENERATORS:
        return f"torch.random.{name}"
    if file == _FILES:
        return f"torch.{name}"
    is_setting = file in (_MAIN, _PRINTING) or file.startswith(_BACKENDS)
    return f"torch's {code.co_qualname}" if is_setting and name.startswith(_SETTERS) else None


def foreign_to_graphs_in_c(function: Any, is_called_by_model: bool) -> str | None:
    """The same for a function in C; setting a generator counts whoever calls it."""
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if isinstance(owner, torch.Generator) and (is_called_by_model or name not in _GENERATORS_READ):
        return f"torch.Generator.{name}"
    return f"torch.{name}" if is_called_by_model and function in _SET_IN_C else None


def is_asked(code: types.CodeType) -> bool:
    """Whether a forward that calls this torch function reads a setting."""
    file, name = code.co_filename, code.co_name
    if file == _MAIN:
        return name.startswith(("get_", "are_", "is_")) and name not in ("is_tensor", "is_storage")
    return file.startswith(_BACKENDS)


def is_asked_of_c(function: Any) -> bool:
    """The same for a function in C."""
    return function in _ASKED_OF_C


def state_of_numpy() -> str:
    """The state of numpy's own generator; profilers do not see its functions."""
    state = _numpy("numpy.random", "get_state") or ()
    return str([part.tobytes() if hasattr(part, "tobytes") else part for part in state])


@contextlib.contextmanager
def numpy_unmoved() -> Iterator[None]:
    """Runs a block that must not draw from or seed numpy's own generator.

    Raises:
        CaptureError: it did. One number is drawn first, so that seeding with the same seed shows, too.
    """
    _numpy("numpy.random", "random_sample")
    before = state_of_numpy()
    yield
    if state_of_numpy() != before:
        raise CaptureError("forward draws numpy's random numbers or seeds them, and a graph cannot")


@contextlib.contextmanager
def generators_kept(devices: list[torch.device]) -> Iterator[None]:
    """Runs a block and then restores the generators of torch, Python and numpy."""
    python, numpy = random.getstate(), _numpy("numpy.random", "get_state")
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy.random"].set_state(numpy)


def _numpy(module: str, name: str) -> Any:
    """The result of a numpy function, if the process has loaded numpy."""
    return getattr(sys.modules[module], name)() if module in sys.modules else None
