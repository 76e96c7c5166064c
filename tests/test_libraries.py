"""Beyond transformers: what other libraries make of attention is found just the same, and computes the same."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from libraries import LIBRARIES, Library
from models import compare, compare_gradients
from torch import Tensor, nn

import fxbt

SHAPES = ((2, 7), (3, 12), (4, 5))  # nn.MultiheadAttention itself asks whether the batch is 1
# One after the other, so that a worker of pytest-xdist optimises a library once.
libraries = pytest.mark.parametrize("library", LIBRARIES, ids=str, scope="module")


@functools.cache
def optimized(library: Library) -> tuple[nn.Module, Any]:
    """The original in eval mode, and what fxbt makes of it."""
    model = library.build()
    # Where torch itself drops padding, only a graph that drops it gives the same.
    nests = any(isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor for module in model.modules())
    padding = "drop" if nests else "keep"
    with torch.no_grad():
        return model, fxbt.optimize(model, example_inputs=example(library), padding=padding)


def example(library: Library) -> tuple[Any, ...]:
    return library.inputs(*SHAPES[0], library.paddings[0])


@libraries
def test_attention_is_found_or_the_reason_is_given(library: Library) -> None:
    _, fast = optimized(library)
    assert fast.report.fallbacks == []
    assert fast.report.hits.get("attention", 0) == library.expected, fast.report.why("attention")
    assert library.reason in fast.report.why("attention")


@libraries
def test_numbers_are_the_originals_at_other_shapes_and_paddings(library: Library) -> None:
    model, fast = optimized(library)
    for batch, length in SHAPES:
        for padding in library.paddings:
            inputs = library.inputs(batch, length, padding)
            with torch.no_grad():
                compare(*(on_valid(run(*inputs), inputs) for run in (fast, model)))
    assert fast.report.fallbacks == []
    assert len(fast.report.graphs) == 1


def on_valid(output: Any, inputs: tuple[Any, ...]) -> Any:
    """A [batch, length, width] output where the mask is True: torch's own fast path gives other values at padding."""
    masks = [x for x in inputs if isinstance(x, Tensor) and x.dtype is torch.bool]
    has_mask = masks and isinstance(output, Tensor) and output.shape[:2] == masks[0].shape
    return output[masks[0]] if has_mask else output


@libraries
def test_gradients_in_training_are_the_originals(library: Library) -> None:
    """Dropout is 0 everywhere."""
    model = library.build().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fast: Any = fxbt.optimize(model, example_inputs=example(library))
    inputs = library.inputs(*SHAPES[1], library.paddings[0])
    compare_gradients(*(gradients_of(model, run, inputs) for run in (fast, model)))
    assert fast.report.fallbacks == []
    assert fast.report.hits.get("attention", 0) == library.expected, fast.report.why("attention")


def gradients_of(model: nn.Module, run: Any, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    output = run(*inputs)
    output = output["sentence_embedding"] if isinstance(output, dict) else output
    output = on_valid(output, inputs)
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


NESTED = next(library for library in LIBRARIES if library.name == "torch.nn encoder")


def test_torchs_own_fast_path_gives_the_same() -> None:
    """In eval, nn.TransformerEncoder may call one fused op a layer; a graph has encoder layers instead."""
    model, fast = optimized(NESTED)
    inputs = NESTED.inputs(3, 9, "none")
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), model(*inputs), atol=1e-5, rtol=1e-5)
    assert fast.report.hits["encoder_layer"] == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_own_nested_tensors_give_the_same_zeros_at_padding() -> None:
    """Under a padding mask it drops padding itself, and so does the graph."""
    model = NESTED.build()
    inputs = NESTED.inputs(3, 9, "right")
    with torch.no_grad():
        fast: Any = fxbt.optimize(model, example_inputs=inputs)
        found, expected = fast(*inputs), model(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected == 0).all(-1).any() and torch.equal(found == 0, expected == 0)
    assert fast.report.hits["encoder_layer"] == 2 and not fast.report.fallbacks
