"""`torch.utils.checkpoint` inside a forward: run plainly during a trace; its operations are marked for recomputation.

Models hold `checkpoint` itself under many names, so the function that it calls is replaced. A marked operation carries
the regions around it, outermost first, in `node.meta["custom"][REGIONS]`: torch and every rewrite copy that along.
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
    """One call of `checkpoint`, and its options."""

    number: int
    preserve_rng_state: bool
    determinism_check: str
    early_stop: bool


def regions_of(node: fx.Node) -> tuple[Region, ...]:
    """The checkpoints around a node, outermost first."""
    return (node.meta.get("custom") or {}).get(REGIONS, ())


@contextlib.contextmanager
def run_plainly() -> Iterator[None]:
    """Runs checkpointed functions in this block plainly; during a trace, their operations are marked.

    Raises:
        CaptureError: a checkpoint decides itself what is kept (`context_fn`), or its gradients would depend on which
            tensors require them.
    """
    generator = getattr(*CHECKPOINT)
    apply = function_apply()
    thread = threading.get_ident()  # the replaced functions belong to the whole process

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
            "a checkpoint with use_reentrant=True is given no tensor that requires a gradient, and so computes no "
            "gradients; pass use_reentrant=False"
        )
    with _marked(Region(next(_NUMBERS), preserve_rng_state, "none", True)):
        return function(*args)


def _region(*args: Any, **kwargs: Any) -> Iterator[None]:
    if not torch.is_grad_enabled():
        yield
        return
    told = checkpoint_settings(*args, **kwargs)
    if told["context_fn"] is not torch_checkpoint.noop_context_fn:
        raise CaptureError("a checkpoint chooses with a context_fn what it keeps, and a graph cannot call it")
    region = Region(next(_NUMBERS), told["preserve_rng_state"], told["determinism_check"], told["early_stop"])
    with _marked(region):
        yield


@contextlib.contextmanager
def _marked(region: Region) -> Iterator[None]:
    """Marks everything traced in a block; does nothing outside a trace."""
    mode = get_proxy_mode()
    if mode is None:
        yield
        return
    nodes = mode.tracer.graph.nodes
    last = next(iter(reversed(nodes)), None)
    yield
    for node in itertools.takewhile(lambda node: node is not last, reversed(nodes)):
        # inner blocks have marked their nodes already
        node.meta["custom"] = {**node.meta.get("custom", {}), REGIONS: (region, *regions_of(node))}


def mark_blocks(module: fx.GraphModule) -> None:
    """Puts the call of a block (`with torch.autocast(...)`, kept whole) into the regions of the block's content."""
    for node in module.graph.nodes:
        bodies = [getattr(module, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"]
        inside = [regions_of(n) for body in bodies if isinstance(body, fx.GraphModule) for n in body.graph.nodes]
        if marks := next(filter(None, inside), ()):
            node.meta["custom"] = {**node.meta.get("custom", {}), REGIONS: marks}
