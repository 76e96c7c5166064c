"""The conditions of a captured graph, line by line: where all lines are equal, a trace gives the same graph.

They cover the code that forward ran and everything it can reach (`capture.surroundings`), the model's attributes and
the kinds of its tensors (`capture.model_state`), the kind of call, the versions and the machine.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import platform
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..capture import places
from ..capture.places import Place
from ..capture.surroundings import Surroundings
from .descriptions import Descriptions, code_digest, digest, name_of_kind
from .model_lines import lines_of_model

_NAMED = ("torch", "transformers", "Python", "fxbt", "machine", "class")
_OF_EACH_PROCESS = {b"_", b"SHLVL", b"PWD", b"OLDPWD", b"PYTEST_CURRENT_TEST", b"PYTEST_XDIST_WORKER", b"COLUMNS"}


@dataclass(frozen=True)
class Conditions:
    """The conditions of a graph: digests or plain texts by name.

    `reached` are places that code reaches through others. If all places known to both processes are equal, no code can
    reach a place that only one of them has.
    """

    versions: dict[str, str]
    model: dict[str, str]
    ran: dict[str, str]
    reached: dict[str, str]

    def digest(self) -> str:
        """Equal for equal versions, models and code."""
        return digest(repr([sorted(part.items()) for part in (self.versions, self.model, self.ran)]))

    def differs_from(self, stored: Conditions) -> str | None:
        """The first difference from the conditions of a stored graph; None if there is none.

        Example:
            >>> now.differs_from(stored)
            'torch was 2.12.0 and is 2.13.0'
        """
        pairs = ((getattr(stored, kind.name), getattr(self, kind.name)) for kind in fields(self))
        for was, now in pairs:
            common = was.keys() & now.keys() if now is self.reached else {**was, **now}
            for name in common:
                if was.get(name) != now.get(name):
                    return _words(name, was.get(name), now.get(name))
        return None


def _words(name: str, was: str | None, now: str | None) -> str:
    if was is None or now is None:
        return f"{name} {'is new' if was is None else 'is gone'}"
    return f"{name} was {was} and is {now}" if name in _NAMED else f"{name} differs"


def signature_of(model: nn.Module, key: Any) -> str:
    """A text for the kind of a call (by its key) of a model of this class.

    Raises:
        Unstorable: there is no such text.
    """
    return digest(f"{name_of_kind(type(model))} {Descriptions().of(key)}")


def conditions_of(model: nn.Module, around: Surroundings) -> Conditions:
    """The conditions of a graph captured from the model as it is now, in these surroundings.

    Raises:
        Unstorable: something has no text that another process could compare.

    Example:
        >>> conditions_of(model, around).versions["torch"]
        '2.13.0+cpu'
    """
    classes = {base for module in model.modules() for base in type(module).__mro__}
    describe = Descriptions(classes)
    ran = {f"the code of {code.co_qualname}": code_digest(code) for code in around.codes}
    if around.settings is not None:
        ran["settings of the process"] = digest(describe.of(around.settings.values))
    return Conditions(
        versions(model), lines_of_model(model, describe, around.read), ran, _lines_of_places(around, describe)
    )


# Versions and machine


def versions(model: nn.Module) -> dict[str, str]:
    """The versions, the machine, and the model's class."""
    found = {
        "fxbt": _of_fxbt(),
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "Python": platform.python_version(),
        "machine": " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *_accelerators(model)]),
        "class": name_of_kind(type(model)),
        "default dtype": str(torch.get_default_dtype()),
    }
    library = sys.modules.get("transformers")
    return found if library is None else {**found, "transformers": str(getattr(library, "__version__", ""))}


def _accelerators(model: nn.Module) -> list[str]:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    return [f"{device} {torch.cuda.get_device_name(device)}" for device in sorted(devices, key=str)]


@functools.cache
def _of_fxbt() -> str:
    """A digest of fxbt's own code, because its version says little during development."""
    folder = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


# What code reaches


def _lines_of_places(around: Surroundings, describe: Descriptions) -> dict[str, str]:
    lines: dict[str, list[str]] = collections.defaultdict(list)
    for place in around.places():
        if isinstance(place, (places.Function, places.Cell)):
            continue  # these belong to every function with that code; reached ones are part of what names them
        lines[f"torch's {place.name}" if place.is_machinery else place.name].append(_of_place(place, describe))
    return {name: digest("\n".join(sorted(texts))) for name, texts in lines.items()}


def _of_place(place: Place, describe: Descriptions) -> str:
    if place.name == "os.environ":
        return describe.of({key: value for key, value in place.kept.items() if key not in _OF_EACH_PROCESS})
    if isinstance(place, (places.Values, places.Array)):
        return describe.of(place.owner)
    kept = place.kept
    if isinstance(place, places.Items) and isinstance(place.owner, (set, frozenset)):
        kept = set(kept)
    if isinstance(place, places.Names):
        kept = {name: kept[name] for name in sorted(kept)}
    return f"{type(place).__name__} {describe.of(kept, 1)}"
