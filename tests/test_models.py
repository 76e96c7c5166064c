"""Whole models: every attention and layer found, projections merged, and the outputs those of the eager original.

One graph a model: captured with the first shape, run on all shapes and paddings.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from models import (
    CASES,
    CASES_BY_NAME,
    VARIANT_IDS,
    VARIANTS,
    Case,
    Inputs,
    compare,
    compare_gradients,
    count_attentions,
    gradients,
)
from packaging import version
from torch import nn

import fxbt

TRANSFORMERS = version.parse(transformers.__version__).major
# One after the other, so that a worker of pytest-xdist optimises a model once.
variants = pytest.mark.parametrize(("case", "implementation"), VARIANTS, ids=VARIANT_IDS, scope="module")


def example(case: Case) -> Inputs:
    """The inputs a case is captured with."""
    batch, seq = case.shapes[0]
    return case.inputs(batch, seq, case.paddings[0])


@functools.cache
def optimized(name: str, implementation: str) -> tuple[nn.Module, Any]:
    """A case's original and the optimised model, captured ahead."""
    case = CASES_BY_NAME[name]
    model = case.build(implementation)
    with torch.no_grad():
        return model, fxbt.optimize(model, example_inputs=example(case))


def eager_twin(case: Case, model: nn.Module) -> nn.Module:
    """The eager original with the weights of `model`."""
    eager = case.build("eager")
    eager.load_state_dict(model.state_dict())
    return eager


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_ground_itself_counts_right(case: Case) -> None:
    model = case.build(case.implementations[0])
    assert count_attentions(model, example(case)) == case.attentions


@variants
def test_outputs_are_the_originals(case: Case, implementation: str) -> None:
    model, fast = optimized(case.name, implementation)
    eager = eager_twin(case, model)
    for batch, seq in case.shapes:
        for padding in case.paddings:
            inputs = case.inputs(batch, seq, padding)
            with torch.no_grad():
                actual, own, expected = fast(**inputs), model(**inputs), eager(**inputs)
            valid = None if implementation == "eager" else case.valid(inputs)
            dropped = case.valid(inputs)
            compare(actual, own, atol_of_magnitude=case.tolerance, dropped=dropped)
            compare(actual, expected, atol_of_magnitude=case.tolerance, valid=valid, dropped=dropped)
    assert fast.report.fallbacks == []
    assert len(fast.report.graphs) == 1, list(fast.report.graphs)


@variants
def test_every_attention_is_found(case: Case, implementation: str) -> None:
    model, fast = optimized(case.name, implementation)
    expected = count_attentions(model, example(case))
    assert fast.report.hits.get("attention", 0) == expected, fast.report.why("attention")
    text = fast.report.after
    assert "softmax" not in text, text


@variants
def test_projections_of_one_input_are_merged(case: Case, implementation: str) -> None:
    _, fast = optimized(case.name, implementation)
    assert fast.report.hits.get("qkv", 0) >= case.qkv, fast.report.why("qkv")


@variants
def test_every_layer_is_one_node(case: Case, implementation: str) -> None:
    _, fast = optimized(case.name, implementation)
    found = tuple(fast.report.hits.get(rule, 0) for rule in ("encoder_layer", "decoder_layer"))
    assert found == case.layers, f"{fast.report.why('encoder_layer')}\n{fast.report.why('decoder_layer')}"


@pytest.mark.parametrize("name", ["multihead-attention", "transformer-encoder"])
def test_a_batch_that_the_model_itself_tells_apart_has_its_own_graph(name: str) -> None:
    case = CASES_BY_NAME[name]
    model = case.build("sdpa")
    inputs = case.inputs(1, 5, "right")
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs=example(case))
        compare(fast(**inputs), model(**inputs), dropped=case.valid(inputs))
    assert fast.report.hits["attention"] == case.attentions


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "nanogpt"])
def test_verified_rewrites_hold(name: str) -> None:
    case = CASES_BY_NAME[name]
    model = case.build("eager")
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs=example(case), verify=True)
        inputs = example(case)
        compare(fast(**inputs), model(**inputs), dropped=case.valid(inputs))
    assert fast.report.hits["attention"] == case.attentions
    assert fast.report.hits.get("qkv", 0) >= case.qkv


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_gradients_are_the_originals(name: str) -> None:
    case = CASES_BY_NAME[name]
    model = case.build("eager")
    fast = fxbt.optimize(model, example_inputs=example(case))
    compare_gradients(*gradients(model, fast, case.inputs(*case.shapes[1], "right")))
    # GPT-2 of transformers 4 fills the future and adds the padding: SDPA's gradient differs in rows that both block.
    differs = name == "gpt2" and TRANSFORMERS < 5
    assert fast.report.hits["attention"] == (0 if differs else case.attentions)
    assert ("whose gradients differ" in fast.report.why("attention")) == differs


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart", "vit"])
@pytest.mark.parametrize("extra", [{"output_hidden_states": True}, {"return_dict": False}], ids=str)
def test_other_forms_of_output(name: str, extra: dict[str, Any]) -> None:
    case = CASES_BY_NAME[name]
    model = case.build("eager")
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={**example(case), **extra})
        inputs = case.inputs(*case.shapes[1], case.paddings[0])
        compare(fast(**inputs, **extra), model(**inputs, **extra), dropped=case.valid(inputs))
    assert fast.report.hits["attention"] == case.attentions
    assert fast.report.fallbacks == []


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_weights_as_output_keep_their_attention(name: str) -> None:
    case = CASES_BY_NAME[name]
    model = case.build("eager")
    inputs = {**example(case), "output_attentions": True}
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs=inputs)
        compare(fast(**inputs), model(**inputs))
    assert fast.report.hits.get("attention", 0) == 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_half_precision_is_no_worse_than_eager(name: str, implementation: str) -> None:
    case = CASES_BY_NAME[name]
    exact = case.build("eager").double()
    model = case.build(implementation).to(torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    eager = eager_twin(case, model).to(torch.bfloat16)
    inputs = example(case)
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs=inputs)
        want = exact(**inputs)[0]
        valid = inputs["attention_mask"].bool()
        error, allowed = ((m(**inputs)[0].double() - want)[valid].abs().mean() for m in (fast, eager))
    assert fast.report.hits["attention"] == case.attentions
    assert error <= 1.2 * allowed, f"mean error {error:.3g} against fp64, eager's own is {allowed:.3g}"


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "nanogpt"])
def test_autocast_is_no_worse_than_eager(name: str) -> None:
    case = CASES_BY_NAME[name]
    model = case.build("eager")
    inputs = example(case)
    with torch.no_grad():
        want = first(model(**inputs))
        with torch.autocast("cpu", torch.bfloat16):
            fast = fxbt.optimize(model, example_inputs=inputs)
            actual, expected = first(fast(**inputs)), first(model(**inputs))
    assert actual.dtype == expected.dtype
    valid = next((mask for mask in case.valid(inputs) if mask.shape == want.shape[:2]), ...)
    error, allowed = ((t.float() - want)[valid].abs().mean() for t in (actual, expected))
    assert error <= 1.2 * allowed, f"mean error {error:.3g} against fp32, eager's own is {allowed:.3g}"
    assert fast.report.hits["attention"] == case.attentions, fast.report.why("attention")
    assert fast.report.fallbacks == []


def first(output: Any) -> torch.Tensor:
    """The first tensor of an output."""
    return output if isinstance(output, torch.Tensor) else output[0]
