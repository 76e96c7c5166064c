"""What graphs call on CUDA: on fake CUDA tensors for their form; the numbers only where there is a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import ENCODER, VOCAB, huggingface
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import fxbt
import fxbt.kernels.packed as packed
import fxbt.lower.once
from fxbt.capture.call import make_call
from fxbt.capture.capture import capture
from fxbt.graph.canonical import canonicalize
from fxbt.graph.miss import Miss
from fxbt.padding.drop import drop_padding
from fxbt.pipeline import default_rules
from fxbt.rewrite.outline import inline
from fxbt.rewrite.stage import run_stage
from fxbt.runtime.unpadding_on_cuda import UnpaddingOnCuda

SDPA = torch.ops.aten.scaled_dot_product_attention.default
SETTINGS = {**ENCODER, "hidden_size": 32, "num_attention_heads": 4}  # heads of 8
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="numbers on CUDA need a GPU, and none is here")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def graph_on_cuda(name, dtype, **settings):
    """The rewritten graph of a model, its values as if they were on CUDA."""
    module = graph_on_cpu(name, dtype, **settings)
    for node in module.graph.nodes:
        node.meta["val"] = fx.node.map_aggregate(node.meta.get("val"), as_if_on_cuda)
    return module


def graph_on_cpu(name, dtype, **settings):
    model = huggingface(name, **{**SETTINGS, **settings})("eager").eval().to(dtype)
    ids = torch.randint(3, VOCAB, MASK.shape)
    captured = capture(model, make_call(model, input_ids=ids, attention_mask=MASK))
    canonicalize(captured.module)
    for rule in default_rules():
        run_stage(captured.module, rule, None, {})
    canonicalize(captured.module)
    return inline(captured.module)


def as_if_on_cuda(value):
    if not isinstance(value, torch.Tensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def targets(module):
    return [node.target for node in module.graph.nodes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_tokens_attend_by_one_kernel(dtype):
    unpadded = drop_padding(graph_on_cuda("BertModel", dtype))
    assert targets(unpadded.module).count(packed.varlen_attention) == 2
    assert packed.attention not in targets(unpadded.module) and SDPA not in targets(unpadded.module)


def test_causal_attention_is_a_window():
    unpadded = drop_padding(graph_on_cuda("LlamaModel", torch.bfloat16, num_key_value_heads=2, use_cache=False))
    calls = [node for node in unpadded.module.graph.nodes if node.target is packed.varlen_attention]
    assert [node.args[4] for node in calls] == [True, True]


@pytest.mark.parametrize(
    "name, dtype, settings, reason",
    [
        ("BertModel", torch.float32, {}, "needs float16 or bfloat16"),
        ("BertModel", torch.bfloat16, {"hidden_size": 48}, "need one head_dim of 8, 16, ... 256"),
        ("MPNetModel", torch.bfloat16, {}, "supports no bias"),
    ],
)
def test_what_the_kernel_does_not_take_stays_dense(name, dtype, settings, reason):
    with pytest.raises(Miss, match=reason):
        drop_padding(graph_on_cuda(name, dtype, **settings))


def test_the_kernel_takes_what_it_is_given():
    """Its own checks of shapes, dtypes and devices, on fake tensors."""
    with FakeTensorMode():
        query = torch.empty(1, 4, 11, 8, dtype=torch.bfloat16, device="cuda")
        key = torch.empty(1, 2, 11, 8, dtype=torch.bfloat16, device="cuda")
        bounds = torch.empty(4, dtype=torch.int32, device="cuda")
        tokens = packed.Tokens(3, 5, bounds, bounds, bounds, [], [], 5, bounds, bounds)
        output = packed.varlen_attention(query, key, key, tokens, is_causal=True, enable_gqa=True)
    assert output.shape == query.shape and output.dtype is query.dtype and output.device == query.device


def sequence_by_sequence(q, k, v, starts, key_starts, longest, longest_key, *, scale, window_size, enable_gqa):
    """What `varlen_attn` is documented to compute."""
    assert starts is key_starts and starts.dtype is torch.int32 and longest == int(starts.diff().max()) == longest_key
    outputs = [
        F.scaled_dot_product_attention(
            *(x[start:end].transpose(0, 1) for x in (q, k, v)),
            is_causal=window_size == (-1, 0),
            scale=scale,
            enable_gqa=enable_gqa,
        ).transpose(0, 1)
        for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False)
    ]
    return torch.cat(outputs)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_its_arguments_mean_what_attention_by_groups_does(is_causal, key_heads, monkeypatch):
    monkeypatch.setattr(packed, "varlen_attention_by_torch", sequence_by_sequence)
    tokens = packed.Tokens.of(MASK)
    counts = MASK.sum(1).sort().values
    flat = tokens.flat
    on_cuda = packed.Tokens(*(3, 5, tokens.rows, tokens.positions, flat), [], [], 5, cumulative(counts), flat)
    q, k, v = (torch.randn(1, heads, int(MASK.sum()), 8) for heads in (4, key_heads, key_heads))
    options = {"is_causal": is_causal, "scale": 0.3, "enable_gqa": key_heads != 4}
    expected = packed.attention(q, k, v, tokens, **options)
    torch.testing.assert_close(packed.varlen_attention(q, k, v, on_cuda, **options), expected)


def cumulative(counts):
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


@pytest.mark.parametrize("columns", [5, 8, 13])
def test_rows_of_a_mask_begin_where_the_kernel_asks(columns):
    with FakeTensorMode():
        mask = torch.ones(2, 1, columns, columns, dtype=torch.bool, device="cuda")
        bias = fxbt.lower.once.additive(mask, torch.float16)
    assert bias.shape == mask.shape and bias.dtype is torch.float16 and bias.device == mask.device
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1]) and bias.stride(-1) == 1


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["BertModel", "MPNetModel"])
def test_a_model_agrees_on_a_gpu(name, dtype, monkeypatch):
    monkeypatch.setattr(UnpaddingOnCuda, "_is_slower", lambda self, run, tensors: False)  # tiny models are, perhaps
    model = huggingface(name, **SETTINGS)("eager").eval().to("cuda", dtype)
    fast = fxbt.optimize(model)
    call = {"input_ids": torch.randint(3, VOCAB, MASK.shape).cuda(), "attention_mask": MASK.cuda()}
    exact = huggingface(name, **SETTINGS)("eager").eval().double()(**{k: v.cpu() for k, v in call.items()})
    valid = MASK.bool()
    fast(**call)
    found, eager = (m(**call).last_hidden_state.cpu().double()[valid] for m in (fast, model))
    errors = [(values - exact.last_hidden_state[valid]).norm() for values in (found, eager)]
    assert errors[0] <= 2 * errors[1] + 1e-5  # as near to float64 as eager attention in the same dtype
    if name == "BertModel" and dtype is not torch.float32:
        assert fast.report.latest.calls["packed"] > 0


@needs_gpu
@pytest.mark.parametrize("most_filled", [0, 3])
def test_tokens_of_a_mask_on_a_gpu(most_filled):
    size = int(MASK.sum()) + most_filled
    here, there = (packed.Tokens.on_device(mask, size, most_filled) for mask in (MASK, MASK.cuda()))
    for name in ("rows", "positions", "flat", "targets", "bounds"):
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name))
