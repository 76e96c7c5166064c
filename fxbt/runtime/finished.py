"""`Finished`: the graphs that programs are made of, with nothing left to prove; as text, for other processes.

What was proven of them rests on the captured graph, on fxbt's own code (both of which `stored.conditions` compares), on
the padding option, and on the content of some constants, whose digests stand beside the graphs. What is checked on an
example when programs are made is checked again by who reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from ..analysis.masks import read_constants
from ..capture.containers import Given
from ..graph.blocks import ATTENTIONS, mask_of
from ..graph.lowerings import LOWERINGS
from ..graph.miss import Miss
from ..graph.node import is_stochastic
from ..padding.drop import Output, Unpadded
from ..padding.padded_calls import GivenLengths, GivenMask
from ..padding.proof import is_read
from ..padding.sequences import Batch
from ..padding.without_masks import Unmasked
from ..stored.descriptions import digest
from ..stored.errors import Malformed, Unstorable, checked
from ..stored.modules import ModulesReader, ModulesWriter
from ..stored.tensors import own_tensor, values_of

_PARTS = ("padding", "modules", "dense", "assumes", "batch", "unpadded", "unmasked", "digests")
_COMPARISONS = ("==", "!=", ">", ">=", "<", "<=")
_MOST_DIMS = 32


@dataclass(frozen=True)
class Finished:
    """The graphs of a model: dense, on valid tokens alone, and without masks; and how batches may be parted.

    `assumes` are the constants, by name, on whose content the dense one rests; `digests` are of all constants that some
    proof may have read, as they are when this is made, or the obstacle to knowing them.
    """

    dense: fx.GraphModule
    assumes: Mapping[str, Tensor]
    batch: Batch | None
    unpadded: Unpadded | None
    unmasked: Unmasked | None
    digests: Mapping[str, str] | Unstorable

    @classmethod
    def of(
        cls,
        dense: fx.GraphModule,
        assumes: Mapping[str, Tensor],
        batch: Batch | None,
        unpadded: Unpadded | None,
        unmasked: Unmasked | None,
    ) -> Finished:
        """Graphs whose proofs read the constants as they are now."""
        made = cls(dense, assumes, batch, unpadded, unmasked, {})
        return replace(made, digests=_digests(made))

    @property
    def graphs(self) -> list[fx.GraphModule]:
        """All graphs that hold tensors of the model by name."""
        unpadded = [self.unpadded.module, self.unpadded.masks, self.unpadded.guards] if self.unpadded else []
        return [self.dense, *unpadded, *([self.unmasked.module] if self.unmasked else [])]


def written(finished: Finished, padding: str, model: nn.Module) -> dict[str, Any]:
    """The graphs as what `json` takes.

    Raises:
        Unstorable: there is something in them that files have no word for.

    Example:
        >>> json.dumps(written(finished, "drop", model))
    """
    if LOWERINGS or is_stochastic(finished.dense.graph):
        raise Unstorable("a graph that draws random numbers, or with lowerings of the user's, is lowered anew")
    if isinstance(finished.digests, Unstorable):
        raise finished.digests
    returned: Any = finished.dense.graph.output_node().args[0]
    if any(type(value) is Given for value in returned):
        raise Unstorable("forward returns an argument, which the original's own result tells")
    writer = ModulesWriter(model)
    parts = {
        "padding": padding,
        "dense": writer.place(finished.dense),
        "assumes": sorted(finished.assumes),
        "batch": None if finished.batch is None else _written_batch(finished.batch, writer),
        "unpadded": None if finished.unpadded is None else _written_unpadded(finished.unpadded, writer),
        "unmasked": None if finished.unmasked is None else _written_unmasked(finished.unmasked, writer),
        "digests": finished.digests,
    }
    return {**parts, "modules": writer.written()}


def _digests(finished: Finished) -> dict[str, str] | Unstorable:
    try:
        return {name: digest(values_of(tensor)) for name, tensor in _rested_on(finished).items()}
    except Unstorable as obstacle:
        return obstacle


def _rested_on(finished: Finished) -> dict[str, Tensor]:
    """All constants on whose content a proof may rest, by name."""
    found = dict(finished.assumes)
    for part in (finished.unpadded, finished.unmasked):
        found |= {} if part is None else part.assumes
    masks = [_mask(node) for node in finished.dense.graph.nodes if node.target in ATTENTIONS]
    for mask in dict.fromkeys(mask for mask in masks if mask is not None):
        found |= {str(node.target): content for node, content in read_constants(mask).items() if is_read(content)}
    return found


def _mask(attention: fx.Node) -> fx.Node | None:
    try:
        mask = mask_of(attention)
    except Miss:  # nothing is proven of such an attention
        return None
    return mask if isinstance(mask, fx.Node) else None


def _written_batch(batch: Batch, writer: ModulesWriter) -> dict[str, Any]:
    return {
        "inputs": batch.inputs,
        "outputs": batch.outputs,
        "values": [[writer.expression(nbytes), count] for nbytes, count in batch.values_of_sizes],
        "returned": writer.expression(batch.returned_of_sizes),
    }


def _written_unpadded(unpadded: Unpadded, writer: ModulesWriter) -> dict[str, Any]:
    return {
        "module": writer.place(unpadded.module),
        "masks": writer.place(unpadded.masks),
        "guards": writer.place(unpadded.guards),
        "given": [_written_given(given) for given in unpadded.given],
        "reasons": unpadded.reasons,
        "outputs": [None if each is None else _written_output(each) for each in unpadded.outputs],
        "assumes": sorted(unpadded.assumes),
    }


def _written_given(given: GivenMask | GivenLengths) -> list[Any]:
    if isinstance(given, GivenLengths):
        return ["lengths", given.place]
    return ["mask", given.place, given.comparison, float(given.number).hex()]


def _written_output(output: Output) -> list[Any]:
    return [output.mask, output.batch, output.token, float(output.fill).hex()]


def _written_unmasked(unmasked: Unmasked, writer: ModulesWriter) -> dict[str, Any]:
    return {"module": writer.place(unmasked.module), "assumes": sorted(unmasked.assumes)}


# Reading


def read(text: Any, padding: str, model: nn.Module) -> Finished | None:
    """What `written` made, as graphs of `model`; None where the text is for another option, or for other constants.

    Raises:
        Malformed: it is none of fxbt's.
    """
    parts = checked(text, dict)
    if set(parts) != set(_PARTS):
        raise Malformed("finished graphs are not what they are in this version")
    digests = checked(parts["digests"], dict)
    if parts["padding"] != padding or LOWERINGS or not all(_is_as_it_was(model, *each) for each in digests.items()):
        return None
    reader = ModulesReader(parts["modules"], model)
    dense = reader.module(parts["dense"])
    unmasked = parts["unmasked"]
    return Finished(
        dense,
        _assumed(parts["assumes"], model),
        None if parts["batch"] is None else _batch(parts["batch"], dense, reader),
        None if parts["unpadded"] is None else _unpadded(parts["unpadded"], reader, model),
        None if unmasked is None else Unmasked(*_module_and_assumed(unmasked, reader, model)),
        digests,
    )


def _is_as_it_was(model: nn.Module, name: Any, its_digest: Any) -> bool:
    tensor = own_tensor(model, checked(name, str))
    return tensor is not None and digest(values_of(tensor)) == its_digest


def _assumed(names: Any, model: nn.Module) -> dict[str, Tensor]:
    found = {checked(name, str): own_tensor(model, name) for name in checked(names, list)}
    if any(tensor is None for tensor in found.values()):
        raise Malformed("the model has no such constants")
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _module_and_assumed(text: Any, reader: ModulesReader, model: nn.Module) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    parts = _with(text, "module", "assumes")
    return reader.module(parts["module"]), _assumed(parts["assumes"], model)


def _batch(text: Any, dense: fx.GraphModule, reader: ModulesReader) -> Batch:
    parts = _with(text, "inputs", "outputs", "values", "returned")
    values = [(reader.expression(nbytes), checked(count, int)) for nbytes, count in _rows(parts["values"], 2)]
    sides = [[checked(each, bool) for each in checked(parts[side], list)] for side in ("inputs", "outputs")]
    placeholders = dense.graph.find_nodes(op="placeholder")
    if len(sides[0]) != len(placeholders) or not any(sides[0]) or len(sides[1]) != _count_of_outputs(dense):
        raise Malformed("the batch is of another graph")
    return Batch(sides[0], sides[1], values, reader.expression(parts["returned"]), Batch.symbols_of(placeholders))


def _count_of_outputs(module: fx.GraphModule) -> int:
    values: Any = module.graph.output_node().args[0]
    return len(values)


def _unpadded(text: Any, reader: ModulesReader, model: nn.Module) -> Unpadded:
    parts = _with(text, "module", "masks", "guards", "given", "reasons", "outputs", "assumes")
    module, masks, guards = (reader.module(parts[name]) for name in ("module", "masks", "guards"))
    given = [_given(each) for each in checked(parts["given"], list)]
    reasons = [checked(reason, str) for reason in checked(parts["reasons"], list)]
    outputs = [None if each is None else _output(each, len(given)) for each in checked(parts["outputs"], list)]
    counts = _count_of_outputs(masks), _count_of_outputs(guards), _count_of_outputs(module)
    inputs = len(masks.graph.find_nodes(op="placeholder"))
    if counts != (len(given), len(reasons), len(outputs)) or any(each.place >= inputs for each in given):
        raise Malformed("the parts of a graph without padding do not fit each other")
    return Unpadded(module, masks, given, [], guards, reasons, outputs, _assumed(parts["assumes"], model))


def _given(text: Any) -> GivenMask | GivenLengths:
    kind, place, *rest = checked(text, list) or [None, None]
    if checked(place, int) < 0 or (kind, len(rest)) not in (("lengths", 0), ("mask", 2)):
        raise Malformed("it does not say where padding stands")
    if kind == "lengths":
        return GivenLengths(place)
    if rest[0] is not None and rest[0] not in _COMPARISONS:
        raise Malformed("no comparison")
    return GivenMask(place, rest[0], _number(rest[1]))


def _output(text: Any, masks: int) -> Output:
    ((mask, batch, token, fill),) = _rows([text], 4)
    is_mask = 0 <= checked(mask, int) < masks
    if not is_mask or not all(-_MOST_DIMS <= checked(dim, int) < 0 for dim in (batch, token)):
        raise Malformed("it does not say where padding shows")
    return Output(mask, batch, token, _number(fill))


def _number(text: Any) -> float:
    """A number as it was written; whole ones are, as masks of whole numbers are filled with them."""
    number = float.fromhex(checked(text, str))
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _with(text: Any, *names: str) -> dict[str, Any]:
    parts = checked(text, dict)
    if set(parts) != set(names):
        raise Malformed(f"no {', '.join(names)}")
    return parts


def _rows(text: Any, length: int) -> Iterable[list[Any]]:
    rows = [checked(row, list) for row in checked(text, list)]
    if any(len(row) != length for row in rows):
        raise Malformed(f"no rows of {length}")
    return rows
