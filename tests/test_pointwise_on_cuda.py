"""Runs of elementwise steps, norms and layouts as one kernel each: which regions there are, and what they compute."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from models import VOCAB, huggingface
from test_cuda import SETTINGS, graph_on_cpu, graph_on_cuda, needs_gpu
from test_replay import TapeRecorder
from torch import fx

import fxbt
from fxbt.graph.node import copy_of
from fxbt.lower.cuda import pointwise
from fxbt.lower.cuda.graphs import Replay
from fxbt.lower.cuda.pointwise import FusedRegion, fuse_pointwise
from fxbt.lower.steps import Draft, bind_weights
from fxbt.padding.drop import drop_padding
from fxbt.torch_compat import compile_by_inductor

aten = torch.ops.aten
LLAMA = {"num_key_value_heads": 2, "use_cache": False}
ROTARY = "mul, neg, cat, mul, add, mul, neg, cat, mul, add"
NORM = "add, to, rms_norm, to"


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    monkeypatch.setattr(pointwise, "_KNOWN", type(pointwise._KNOWN)())
    monkeypatch.setattr(pointwise, "SMALL", -1)  # compiled however small
    with torch.no_grad():
        yield


def bound(module: fx.GraphModule) -> tuple[fx.Graph, list[torch.Tensor]]:
    draft = Draft(module, copy_of(module.graph)[0])
    bind_weights(draft)
    return draft.graph, draft.weights


def as_it_is(module: fx.GraphModule, tensors: Any) -> Any:
    """A compiler that compiles nothing."""
    return lambda *inputs: outputs if isinstance(outputs := module(*inputs), tuple | list) else (outputs,)


def places(graph: fx.Graph) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in graph.nodes:
        if isinstance(node.target, FusedRegion):
            found[node.target.steps] = found.get(node.target.steps, 0) + 1
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_layers_are_made_of_the_same_few_regions(packed):
    module = graph_on_cuda("LlamaModel", torch.bfloat16, **LLAMA)
    graph, regions = fuse_pointwise(bound(drop_padding(module).module if packed else module)[0], as_it_is)
    assert places(graph) == {ROTARY: 2, NORM: 4, "silu, mul": 2}
    assert len(regions) == 4  # the last norm's sum is read by nothing else
    graph, regions = fuse_pointwise(bound(graph_on_cuda("BertModel", torch.bfloat16))[0], as_it_is)
    assert places(graph) == {"add, layer_norm": 4} and len(regions) == 1


def test_one_region_serves_other_programs_of_the_process():
    (_, one), (_, other) = (
        fuse_pointwise(bound(graph_on_cuda("BertModel", torch.bfloat16))[0], as_it_is) for _ in "12"
    )
    assert one == other
    (_, wider) = fuse_pointwise(bound(graph_on_cuda("BertModel", torch.bfloat16, hidden_size=64))[0], as_it_is)
    (_, exact) = fuse_pointwise(bound(graph_on_cuda("BertModel", torch.float32))[0], as_it_is)
    assert one != wider and one != exact


def test_what_stands_there_once_is_left_as_it_is():
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    y = graph.call_function(aten.linear.default, (x, weight))
    z = graph.call_function(aten.tanh.default, (graph.call_function(aten.add.Tensor, (y, 1)),))
    graph.output(z)
    for node in graph.nodes:
        node.meta["val"] = torch.empty(3, 3)
    assert fuse_pointwise(graph, as_it_is) == (graph, [])


@pytest.mark.parametrize("name, settings", [("BertModel", {}), ("LlamaModel", LLAMA), ("Gemma2Model", LLAMA)])
def test_fused_graphs_compute_the_same(name, settings):
    module = graph_on_cpu(name, torch.float32, **settings)
    graph, weights = bound(module)
    plain = fx.GraphModule({}, graph)
    fused, regions = fuse_pointwise(bound(module)[0], as_it_is)
    assert regions
    run = fx.GraphModule({}, fused)
    inputs = [node.name for node in fused.find_nodes(op="placeholder")]
    assert inputs == [node.name for node in graph.find_nodes(op="placeholder")]
    for shape in ((3, 5), (2, 9), (1, 1), (2, 9)):
        ids, mask = torch.randint(3, VOCAB, shape), torch.ones(shape, dtype=torch.long)
        torch.testing.assert_close(run(ids, mask, *weights), plain(ids, mask, *weights))


def region(*, compiler: Any) -> FusedRegion:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3)
    graph.output(graph.call_function(torch.ops.aten.relu.default, (x,)))
    return FusedRegion(fx.GraphModule({}, graph), compiler)


def test_what_cannot_be_compiled_runs_as_it_was():
    def fails(module: Any, tensors: Any) -> Any:
        raise RuntimeError("Cannot find a working triton installation")

    made, x = region(compiler=fails), torch.randn(2, 3)
    for _ in range(3):
        assert torch.equal(made(x), x.relu())
    assert made.failure == "RuntimeError: Cannot find a working triton installation" and made._variants == []


def test_small_inputs_run_step_by_step_unless_they_are_recorded(monkeypatch):
    compiled = []

    def notes(module: Any, tensors: Any) -> Any:
        compiled.append(tensors[0].shape)
        return as_it_is(module, tensors)

    monkeypatch.setattr(pointwise, "SMALL", 4 * 2 * 3)
    made, x = region(compiler=notes), torch.randn(2, 3)
    assert torch.equal(made(x), x.relu()) and made.state == "not called yet"
    replay = Replay(lambda x: (made(x),), 1, TapeRecorder())
    for _ in range(3):
        assert torch.equal(replay(x)[0], x.relu())
    assert compiled == [x.shape] and made.state == "compiled"
    big = torch.randn(3, 3)
    assert torch.equal(made(big), big.relu())


def test_other_strides_get_a_variant_of_their_own_and_not_too_many():
    compiled = []

    def for_strides(module: Any, tensors: Any) -> Any:
        strides = tensors[0].stride()
        compiled.append(strides)

        def run(x: torch.Tensor) -> Any:
            assert x.stride() == strides
            return (module(x),)

        return run

    made = region(compiler=for_strides)
    for _ in range(2):
        for gap in range(2 * pointwise.MOST_VARIANTS):
            x = torch.randn(2, 3 + gap)[:, :3]
            assert torch.equal(made(x), x.relu())
    assert len(compiled) == pointwise.MOST_VARIANTS


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles for a CPU with g++")
def test_inductor_compiles_a_region_for_all_sizes():
    module = graph_on_cpu("LlamaModel", torch.float32, **LLAMA)
    graph, weights = bound(module)
    plain = fx.GraphModule({}, graph)
    fused, regions = fuse_pointwise(bound(module)[0], compile_by_inductor)
    run = fx.GraphModule({}, fused)
    for shape in ((3, 5), (5, 5), (2, 9), (1, 1), (2, 9), (1, 7)):
        ids, mask = torch.randint(3, VOCAB, shape), torch.ones(shape, dtype=torch.long)
        torch.testing.assert_close(run(ids, mask, *weights), plain(ids, mask, *weights), rtol=1e-4, atol=1e-5)
    assert [made.failure for made in regions] == [None] * len(regions)
    assert [len(made._variants) for made in regions] == [1] * len(regions)


@needs_gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_regions_are_compiled_on_a_gpu(cuda_graphs):
    make = huggingface("LlamaModel", **{**SETTINGS, **LLAMA})
    model, exact = make("sdpa").eval().to("cuda", torch.bfloat16), make("sdpa").eval().double()
    fast: Any = fxbt.optimize(model, cuda_graphs=cuda_graphs)
    for shape in ((3, 40), (2, 9), (1, 1), (3, 40), (2, 9), (3, 40)):
        ids = torch.randint(3, VOCAB, shape)
        right = exact(input_ids=ids).last_hidden_state
        errors = [(m(input_ids=ids.cuda()).last_hidden_state.cpu().double() - right).norm() for m in (fast, model)]
        assert errors[0] <= 1.5 * errors[1] + 1e-5
    regions = fast.report.latest.fused_regions
    assert regions and set(regions.values()) == {"compiled"}, regions
