"""The fused call nodes: a rewritten graph has one for each block that rules found.

Each is a plain function of a body (the captured graph of the block) and the values that the body reads, the block's own
inputs first. A fused node therefore differentiates, fake-traces and compiles like the nodes it replaces, and
`fxbt.rewrite.outline.inline` restores those for lowering.

`attention_by_products` is a torch operator for attention that SDPA cannot express.

Example::

    for node in fast.report.latest.module.graph.nodes:
        if node.target is fxbt.ops.encoder_layer:
            body, x, *others = node.args  # others: the attention mask first, the weights last
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..errors import RuleError
from ..kernels.attention_products import attention_by_products as attention_by_products
from .miss import Miss
from .node import argument

Body = Callable[..., torch.Tensor]


def rotary(body: Body, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of `x` (batch, heads, seq, head_dim): x * cos + rotate(x) * sin.

    Source: Su et al. 2021, "RoFormer: enhanced transformer with rotary position embedding", section 3.4.2.
    """
    return body(x, cos, sin, *others)


def residual_norm(body: Body, x: torch.Tensor, branch: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """norm(x + branch) over the last dim, where norm is a layer norm or an RMS norm; x is (batch, seq, hidden)."""
    return body(x, branch, *others)


def mlp(body: Body, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """act(x W1^T) W2^T, or gated: (act(x Wg^T) * x Wu^T) Wd^T; x is (batch, seq, hidden)."""
    return body(x, *others)


def encoder_layer(body: Body, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """A transformer encoder layer on x (batch, seq, hidden): self-attention and MLP, each with residual and norm.

    `others`: the attention mask (batch, heads, seq, seq) if there is one, rotary tables, and last the weights.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.1; pre-norm: Xiong et al. 2020.
    """
    return body(x, *others)


def decoder_layer(body: Body, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """A transformer decoder layer on x (batch, seq, hidden): causal self-attention, optional cross-attention, MLP.

    `others`: the encoder's states (batch, source, hidden) if the layer attends to them, masks, and last the weights.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.1.
    """
    return body(x, *others)


SDPA = torch.ops.aten.scaled_dot_product_attention.default
BY_PRODUCTS = torch.ops.fxbt.attention_by_products.default
ATTENTIONS = frozenset({SDPA, BY_PRODUCTS})
FUSED: dict[str, Callable[..., torch.Tensor]] = {
    op.__name__: op for op in (rotary, residual_norm, mlp, encoder_layer, decoder_layer)
}
BUILT_IN = frozenset(FUSED)
WORDS = {"attention", "activation", "normalize", "either", "maybe", "number", "weight", "any", "computed_from"}


def block(name: str, formula: str = "") -> Callable[..., torch.Tensor]:
    """Makes a block of your own: its call nodes call `fxbt.ops.<name>`; a rule with `outline = "<name>"` finds it.

    A second call with the same name returns the same block. `fxbt.lowering` registers a function that computes it. Your
    rules run before the built-in rules whose blocks they do not name, so a layer around your block is not an
    `encoder_layer` any more.

    Raises:
        RuleError: the name is not an identifier, or already means something else in patterns.

    Example::

        fxbt.block("swiglu", "silu(x gate^T) * (x up^T)")

        class SwiGLU(fxbt.Rule):
            name = outline = "swiglu"

            def pattern(self, op, x):
                return op.silu(op.linear(x, op.weight("gate"))) * op.linear(x, op.weight("up"))
    """
    if name in FUSED and name not in BUILT_IN:
        return FUSED[name]
    if not name.isidentifier() or name in WORDS or name in BUILT_IN or hasattr(torch.ops.aten, name):
        raise RuleError(f"a block cannot be called {name!r}: the name is not an identifier, or it is taken")

    def call(body: Body, *operands: torch.Tensor) -> torch.Tensor:
        return body(*operands)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = formula or None
    FUSED[name] = call
    return call


def __getattr__(name: str) -> Callable[..., torch.Tensor]:
    """The blocks made by `block`."""
    if name not in FUSED:
        raise AttributeError(f"fxbt.ops has no {name!r}; it has {', '.join(FUSED)}")
    return FUSED[name]


def mask_of(attention: fx.Node) -> Any:
    """The mask or bias that one of `ATTENTIONS` adds to its scores; None if there is none.

    Raises:
        Miss: it adds several, adds one before a softcap, or replaces scores.
    """
    if attention.target is SDPA:
        return argument(attention, "attn_mask")
    if argument(attention, "kept") is not None:
        raise Miss("attention replaces scores with a number that does not mask all of them", node=attention)
    before, after = argument(attention, "before"), argument(attention, "after")
    if before or len(after) > 1:
        raise Miss("attention adds several biases to its scores one by one", node=attention)
    return after[0] if after else None
