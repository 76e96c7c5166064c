"""One model type, built and judged: what fxbt made of it, against its own eager original."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from models import difference
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxbt

from . import build, count, inputs

aten = torch.ops.aten
SOFTMAXES = {
    aten.softmax.int,
    aten._softmax.default,
    aten.scaled_dot_product_attention.default,
}
PRECISION = 1e-5  # of an output's magnitude
SECONDS_TO_BUILD = 6
PADDINGS = ("right", "left", "none")


def judge(model_type: str, use_cache: bool = True) -> dict[str, Any]:
    """The row of a model type in the table; `status` is unbuilt, fallback, wrong or optimised."""
    row: dict[str, Any] = {"type": model_type}
    try:
        model, maker = _build(model_type, use_cache)
    except (build.Unbuildable, inputs.NoInputs) as error:
        return {**row, "status": "unbuilt", "reason": str(error)}
    row |= {"class": type(model).__name__, "inputs": maker.names, "parameters": _size(model)}
    calls = [
        (batch, length, padding)
        for batch, length in inputs.SHAPES
        for padding in (PADDINGS if maker.has_mask else ("none",))
    ]
    outputs = [(call, _try(model, maker(*call))) for call in calls]
    calls = [call for call, output in outputs if output is not None]  # audio models take no mask of another length
    expected = [output for _, output in outputs if output is not None]
    row["real"], row["other softmaxes"] = count.attentions(model, maker(*calls[0]))
    start = time.perf_counter()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", fxbt.FxbtWarning)
        # padded positions are compared too
        fast = fxbt.optimize(model, example_inputs=maker(*calls[0]), padding="keep")
        row["capture seconds"] = round(time.perf_counter() - start, 2)
        differences = [_difference(model, fast, maker(*call), want) for call, want in zip(calls, expected, strict=True)]
    return row | _verdict(fast, differences)


def _build(model_type: str, use_cache: bool) -> tuple[nn.Module, inputs.Maker]:
    reason = None
    start = time.process_time()
    try:
        for model, config in build.candidates(model_type, use_cache):
            try:
                return model, inputs.find(model, config)
            except inputs.NoInputs as error:
                reason = reason or error
            if time.process_time() - start > SECONDS_TO_BUILD:
                break
    except build.Unbuildable as error:
        reason = reason or error
    assert reason is not None
    raise reason


def _verdict(fast: Any, differences: list[float | str]) -> dict[str, Any]:
    report = fast.report
    wrong = [d for d in differences if isinstance(d, str)]
    worst = max((d for d in differences if isinstance(d, float)), default=0.0)
    first = next(iter(report.graphs.values()), None)  # the one of the call whose attentions were counted
    hits, all_misses = (first.hits, first.misses) if first else ({}, [])
    row = {
        "graphs": len(report.graphs),
        "found": hits.get("attention", 0),
        "softmaxes": _softmaxes(first.captured.entries) if first else 0,
        "qkv": hits.get("qkv", 0),
        "layers": hits.get("encoder_layer", 0) + hits.get("decoder_layer", 0),
        "difference": worst,
        "misses": sorted({f"{miss.reason} [{miss.found}]" for miss in all_misses if miss.rule == "attention"}),
        "qkv misses": sorted({miss.reason for miss in all_misses if miss.rule == "qkv"}),
    }
    if wrong:
        return row | {"status": "wrong", "reason": wrong[0]}
    if not report.graphs:
        return row | {"status": "fallback", "reason": report.fallbacks[0] if report.fallbacks else "no graph"}
    return row | {"status": "optimised", "reason": report.fallbacks[0] if report.fallbacks else ""}


def _softmaxes(entries: Sequence[Any]) -> int:
    """Softmaxes and whole attentions in a graph that its outputs are computed from."""
    used: set[fx.Node] = set()
    for entry in reversed(entries):
        if entry.node.op == "output" or entry.node in used:
            fx.node.map_arg((entry.args, entry.kwargs), used.add)
    return sum(entry.target in SOFTMAXES for entry in entries if entry.node in used)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _try(model: nn.Module, call: dict[str, Any]) -> Any:
    """The original's output; None where the model itself rejects the call."""
    try:
        return _run(model, call)
    except Exception:
        return None


def _run(model: nn.Module, call: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(**call)


def _difference(model: nn.Module, fast: Any, call: dict[str, Any], expected: Any) -> float | str:
    """The largest difference relative to an output's magnitude, or what is wrong."""
    torch.manual_seed(0)
    try:
        actual = fast(**call)
    except Exception as error:
        return f"raises {build._first_line(error)} where the original does not"
    found, spec = pytree.tree_flatten(actual)
    wanted, wanted_spec = pytree.tree_flatten(expected)
    if spec != wanted_spec and not any("Cache" in str(s) for s in (spec, wanted_spec)):
        return "another structure of outputs"
    pairs = list(zip(found, wanted, strict=False))
    worst = max((_leaf_difference(got, want) for got, want in pairs), default=0.0)
    if worst > PRECISION:
        found, wanted = _without_random(model, call, found, wanted)
        worst = max((_leaf_difference(got, want) for got, want in zip(found, wanted, strict=False)), default=0.0)
    return worst if worst <= PRECISION else _against_float64(model, call, found, wanted, worst)


def _without_random(
    model: nn.Module, call: dict[str, Any], found: list[Any], wanted: list[Any]
) -> tuple[list[Any], list[Any]]:
    """Both outputs, zero where the original's own change with the seed: a graph may draw in another order."""
    again = pytree.tree_leaves(_run(model, call, seed=1))
    pairs = []
    for got, want, other in zip(found, wanted, again, strict=False):
        comparable = isinstance(want, Tensor) and want.is_floating_point() and got.shape == want.shape == other.shape
        if comparable and (random := (other - want).abs() > PRECISION * want.abs().max()).any():
            got, want = got.masked_fill(random, 0), want.masked_fill(random, 0)
        pairs.append((got, want))
    return [got for got, _ in pairs], [want for _, want in pairs]


def _leaf_difference(got: Any, want: Any) -> float:
    if not isinstance(want, Tensor):
        return 0.0
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    known = ~want.isnan()  # a row masked with -inf throughout is NaN in eager attention alone
    if not torch.equal(got.isfinite()[known], want.isfinite()[known]):
        return float("inf")
    error, magnitude = difference(got[known], want[known])
    return error / magnitude


def _against_float64(model: nn.Module, call: dict[str, Any], found: Any, wanted: Any, worst: float) -> float | str:
    """The difference where it is only rounding: no farther from float64 than a few times what eager is.

    Eager may be close by luck where the model is ill-conditioned: what it makes of weights that are one rounding away
    counts as well.
    """
    exact = copy.deepcopy(model).double()
    wide = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in call.items()}
    try:
        reference = pytree.tree_leaves(_run(exact, wide))
        nudged = pytree.tree_leaves(_run(_one_rounding_away(model), call))
    except Exception as error:
        return f"differs by {worst:.1e}; float64 gives no judgement ({build._first_line(error)})"
    for got, want, near, true in zip(found, wanted, nudged, reference, strict=False):
        if not isinstance(want, Tensor) or _leaf_difference(got, want) <= PRECISION:
            continue
        if not want.is_floating_point() or got.shape != want.shape:
            return "integer outputs differ, or shapes do"
        mine, eager, condition = (_leaf_difference(t.double(), true) for t in (got, want, near))
        if not mine <= 4 * max(eager, condition):
            return f"differs by {worst:.1e}; from float64 by {mine:.1e}, eager by {eager:.1e}"
    return worst


def _one_rounding_away(model: nn.Module) -> nn.Module:
    """A copy in which each weight is multiplied by 1 + eps or 1 - eps."""
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            signs = torch.randint(0, 2, weight.shape) * 2 - 1
            weight.mul_(1 + torch.finfo(weight.dtype).eps * signs)
    return other
