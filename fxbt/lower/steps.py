"""What a graph goes through on its way to a program: `AT_INFERENCE` and `WITH_GRADIENTS`, in the order they run.

Blocks that rules found are operations again here, without the padding or the masks that are proven to say nothing, and
some stand in the next block's kernel: so each step finds in the graph itself what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx

from ..graph.node import attribute
from ..graph.record import StageRecord
from ..progress import part
from .by_block import lower_blocks
from .cpu.attention import attend_fast
from .cpu.chain import chained
from .cpu.linears import choose_linears
from .cpu.precision import Precision, narrow_linears
from .cuda.graphs import obstacle
from .cuda.pointwise import FusedRegion, fuse_pointwise
from .derived_weights import Weights, weight_only
from .fixed_caches import write_in_place
from .growing_caches import append_in_place
from .once import look_up_once, make_masks_once, split_heads_once
from .recompute import recomputing


@dataclass
class Draft:
    """A graph that becomes a program: what each step finds, and leaves for those after it.

    Attributes:
        module: whose weights the get_attr nodes of `graph` name.
        derived: what is kept of weights; with gradients nothing is.
        precision: of linears, if it is not the model's own.
        writes: the inputs whose new values are the graph's last outputs.
        constant: the nodes that are computed from weights alone.
        epilogues: the record of what was fused into linears.
        places: of `derived`'s values that are arguments of the graph.
        weights: the graph's last arguments.
        one_by_one: the graph before kernels were joined, if they were.
        regions: what is one kernel on a CUDA device.
    """

    module: fx.GraphModule
    graph: fx.Graph
    derived: Weights | None = None
    precision: type[Precision] | None = None
    writes: Sequence[int] = ()
    constant: set[fx.Node] = field(default_factory=set)
    epilogues: StageRecord | None = None
    places: list[int] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    one_by_one: fx.Graph | None = None
    regions: list[FusedRegion] = field(default_factory=list)

    @property
    def kept(self) -> Weights:
        """What is derived of weights, at inference."""
        assert self.derived is not None, "with gradients nothing is derived"
        return self.derived


def put_own_blocks(draft: Draft) -> None:
    """Blocks that have a lowering of their own get it; what that prepares of weights alone is computed once."""
    prepared = lower_blocks(draft.graph)
    draft.constant = weight_only(draft.module, draft.graph)
    draft.constant.update(n for n in prepared if n.all_input_nodes and draft.constant.issuperset(n.all_input_nodes))


def look_up_weights(draft: Draft) -> None:
    """Rows of a weight at constant places are looked up once."""
    look_up_once(draft.graph, draft.constant)


def fuse_linears(draft: Draft) -> None:
    """Linears by the fastest kernel for each shape, with their epilogues: see `cpu.epilogue.epilogues`."""
    if draft.precision is None:
        draft.epilogues = choose_linears(draft.graph, draft.constant, draft.kept.tuner)
    else:
        draft.epilogues = narrow_linears(draft.precision, draft.graph, draft.constant)


def attend_by_contest(draft: Draft) -> None:
    """Attentions by the fastest kernel for each length, from the merged projection on where that kernel reads it."""
    attend_fast(draft.graph, draft.kept.tuner)


def prepare_operands(draft: Draft) -> None:
    """What several attentions read is made once, and caches grow in place."""
    make_masks_once(draft.graph)
    split_heads_once(draft.graph)
    append_in_place(draft.graph)
    write_in_place(draft.graph, draft.writes)


def keep_derived(draft: Draft) -> None:
    """What is computed from weights alone leaves the graph: it is computed once, and again when a weight changes."""
    draft.places = draft.kept.add(draft.module, draft.graph, draft.constant)


def bind_weights(draft: Draft) -> None:
    """get_attr nodes become the last arguments."""
    graph = draft.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        draft.weights.append(attribute(draft.module, node))
        with graph.inserting_after(last[0]) if last else graph.inserting_before():
            argument = graph.placeholder(f"weight_{node.name}")
        argument.meta = dict(node.meta)
        node.replace_all_uses_with(argument)
        graph.erase_node(node)
        last = [argument]


def fuse_on_cuda(draft: Draft) -> None:
    """Elementwise steps, norms and layouts in a row as one kernel, where all is on one CUDA device."""
    if obstacle(draft.graph) is None:
        draft.graph, draft.regions = fuse_pointwise(draft.graph)


def chain_kernels(draft: Draft) -> None:
    """Kernels of our own in a row as one call: layers, as far as they are made of such."""
    draft.one_by_one = draft.graph
    draft.graph = chained(draft.graph, draft.kept.tuner)


def recompute(draft: Draft) -> None:
    """What a checkpoint encloses is computed again in the backward."""
    draft.graph = recomputing(draft.graph)


class Step(NamedTuple):
    """A step, and what it computes, blocks by their names; where no value is on its `device`, it is left out."""

    computes: str
    run: Callable[[Draft], None]
    device: str = ""


AT_INFERENCE = (
    Step("blocks with a lowering of their own", put_own_blocks),
    Step("look-ups of weights", look_up_weights),
    Step("qkv, mlp, residual_norm", fuse_linears, "cpu"),
    Step("attention", attend_by_contest, "cpu"),
    Step("masks, heads, caches", prepare_operands),
    Step("values of weights alone", keep_derived),
    Step("weights", bind_weights),
    Step("rotary, mlp, residual_norm", fuse_on_cuda, "cuda"),
    Step("encoder_layer, decoder_layer", chain_kernels, "cpu"),
)
WITH_GRADIENTS = (
    Step("weights", bind_weights),
    Step("checkpointed regions", recompute),
)


def lower(draft: Draft, steps: Sequence[Step]) -> None:
    """Takes a graph through the steps that its devices have."""
    devices = {""}
    devices.update(v.device.type for n in draft.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor))
    for step in steps:
        if step.device in devices:
            with part("lower", step.computes):
                step.run(draft)
