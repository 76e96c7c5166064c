"""`torch.utils.checkpoint` inside a forward: run plainly while it is traced, its operations marked for recomputing.

Models hold `checkpoint` itself under many names, so that what it calls is replaced. A marked operation carries the
regions it stands in, outermost first, as `node.meta["custom"][REGIONS]`: torch and every rewrite copy that along.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, fx

from ..errors import CaptureError
from ..torch_compat import CHECKPOINT, AppliedFunction, checkpoint_settings, function_apply, get_proxy_mode

REGIONS = "fxbt_recomputed"
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Region:
    """One call of `checkpoint`, and what it asked for."""

    number: int
    preserve_rng_state: bool
    determinism_check: str
    early_stop: bool


def regions_of(node: fx.Node) -> tuple[Region, ...]:
    """The checkpoints that a node stands in, outermost first."""
    return (node.meta.get("custom") or {}).get(REGIONS, ())


@contextlib.contextmanager
def run_plainly() -> Iterator[None]:
    """Runs checkpointed functions in this block as if they were not; a trace's operations in them are marked.

    Raises `CaptureError` for a checkpoint that decides by itself what is kept (`context_fn`), or whose gradients would
    depend on which tensors require them.
    """
    generator = getattr(*CHECKPOINT)
    apply = function_apply()
    thread = threading.get_ident()  # stand-ins are in the places of functions of the whole process

    def without_reentrance(*args: Any, **kwargs: Any) -> Iterator[None]:
        return _region(*args, **kwargs) if threading.get_ident() == thread else generator(*args, **kwargs)

    def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is torch_checkpoint.CheckpointFunction and threading.get_ident() == thread:
            return _reentrant(*args)
        return apply(cls, *args, **kwargs)

    with (
        mock.patch.object(*CHECKPOINT, without_reentrance),
        mock.patch.object(AppliedFunction, "apply", classmethod(applied)),
    ):
        yield


def _reentrant(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return function(*args)
    if not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        raise CaptureError(
            "a checkpoint with use_reentrant=True is given no tensor that requires a gradient, so that it computes "
            "none; pass use_reentrant=False"
        )
    with _marked(Region(next(_NUMBERS), preserve_rng_state, "none", True)):
        return function(*args)


def _region(*args: Any, **kwargs: Any) -> Iterator[None]:
    if not torch.is_grad_enabled():
        yield
        return
    told = checkpoint_settings(*args, **kwargs)
    if told["context_fn"] is not torch_checkpoint.noop_context_fn:
        raise CaptureError("a checkpoint says by a context_fn what it keeps; a graph would not ask it")
    region = Region(next(_NUMBERS), told["preserve_rng_state"], told["determinism_check"], told["early_stop"])
    with _marked(region):
        yield


@contextlib.contextmanager
def _marked(region: Region) -> Iterator[None]:
    """Marks what is traced in a block; where nothing is traced, nothing."""
    mode = get_proxy_mode()
    if mode is None:
        yield
        return
    nodes = mode.tracer.graph.nodes
    last = next(iter(reversed(nodes)), None)
    yield
    for node in itertools.takewhile(lambda node: node is not last, reversed(nodes)):
        # blocks inside have marked theirs already
        node.meta["custom"] = {**node.meta.get("custom", {}), REGIONS: (region, *regions_of(node))}


def mark_blocks(module: fx.GraphModule) -> None:
    """A call of a block (`with torch.autocast(...)` kept whole) stands in the regions of what is in the block."""
    for node in module.graph.nodes:
        bodies = [getattr(module, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"]
        inside = [regions_of(n) for body in bodies if isinstance(body, fx.GraphModule) for n in body.graph.nodes]
        if marks := next(filter(None, inside), ()):
            node.meta["custom"] = {**node.meta.get("custom", {}), REGIONS: marks}
