"""A loss over tokens: right on valid tokens alone where the labels of padding say that they do not count."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..analysis.axis_transfer import Labels
from ..graph.miss import Miss
from ..graph.node import argument
from ..graph.walk import ancestors
from ..kernels import packed
from .tokens import Dense, Packed, Writer

CROSS_ENTROPY = torch.ops.aten.cross_entropy_loss.default
NOT_REDUCED = 0  # torch's number for reduction="none"


def cross_entropy(writer: Writer, node: fx.Node) -> Dense:
    """The sum or mean over (batch * tokens, classes) scores and (batch * tokens) labels, from valid tokens alone.

    Labels equal to `ignore_index` count neither in the sum nor in the number that it is divided by. A guard looks at
    those of padding in each call.

    Raises:
        Miss: it is another loss, or nothing says that padding does not count.
    """
    source, target = argument(node, "self"), argument(node, "target")
    scores, others = writer.values[source], [writer.values[n] for n in node.all_input_nodes if n is not source]
    is_plain = argument(node, "reduction") != NOT_REDUCED and not argument(node, "label_smoothing")
    is_by_class = target.meta["val"].dim() == 1 and not target.meta["val"].is_floating_point()
    if not isinstance(scores, Packed) or not all(isinstance(each, Dense) for each in others):
        raise writer.transfer.unknown(node)
    labels: Labels = {-1: (scores.domain.batch, scores.domain.position)}
    if not is_plain or not is_by_class or writer.labels(scores) != {-2: labels[-1]}:
        raise writer.transfer.unknown(node)
    if not _is_given(writer, target):
        raise Miss("an op sums a loss over tokens, including padded ones, whose labels come from the mask", node=node)
    ignored = argument(node, "ignore_index")
    reason = f"a label at padding is other than {ignored}, so that it counts in the loss"
    writer.guard(reason, packed.is_ignored_at_padding, scores.domain.mask, writer.values[target].node, ignored)
    operands: dict[fx.Node, Any] = {each: writer.values[each].node for each in node.all_input_nodes}
    operands[target] = writer.gathered(target, labels, scores.domain)
    return Dense(writer.copy(node, operands.__getitem__))


def _is_given(writer: Writer, target: fx.Node) -> bool:
    """Whether labels are read from an input other than those that say where tokens are."""
    inputs = {source for source in ancestors([target]) if source.op == "placeholder"}
    return not inputs <= {domain.validity.source for domain in writer.domains}
