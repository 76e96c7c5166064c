"""`torch.utils.checkpoint` inside a model: its graph recomputes the same regions, and keeps no more than they do."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

import fxbt

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(
    "ignore::fxbt.FxbtWarning", "ignore::FutureWarning", "ignore:None of the inputs"
)


class Net(nn.Module):
    def __init__(self, body: Callable[["Net", Tensor], Any], dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(dropout)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def nested(net: Net, x: Tensor, use_reentrant: bool) -> Tensor:
    again = functools.partial(checkpoint, use_reentrant=use_reentrant)

    def inner(v: Tensor) -> Tensor:
        return net.b(v).tanh()

    def outer(v: Tensor) -> Tensor:
        return again(inner, net.a(v).tanh()).tanh() + v

    return again(outer, net.a(x))


def in_place(net: Net, x: Tensor) -> Tensor:
    def body(v: Tensor) -> Tensor:
        y = net.b(v)
        y += 1
        return y.relu_() * v

    return checkpoint(body, net.a(x), use_reentrant=False)


def with_autocast(net: Net, x: Tensor) -> Tensor:
    def body(v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net.b(v).tanh()

    return checkpoint(body, net.a(x), use_reentrant=False).float()


def partly_without_gradients(net: Net, x: Tensor) -> Tensor:
    def body(v: Tensor) -> Tensor:
        with torch.no_grad():
            w = net.a(v).tanh()
        return net.b(v).tanh() * w

    return checkpoint(body, net.a(x), use_reentrant=False)


def two_results(net: Net, x: Tensor) -> Tensor:
    y, z, _ = checkpoint(lambda v: (net.b(v).tanh(), net.a(v).sin(), v.shape[1]), net.a(x), use_reentrant=False)
    return y @ z.mT


BODIES: dict[str, Callable[[Net, Tensor], Any]] = {
    "layer": lambda net, x: net.b(checkpoint(net.encoder, net.a(x), use_reentrant=False)),
    "reentrant": lambda net, x: net.b(checkpoint(net.encoder, net.a(x), use_reentrant=True)),
    "nested": lambda net, x: nested(net, x, False),
    "nested, reentrant": lambda net, x: nested(net, x, True),
    "keyword": lambda net, x: checkpoint(lambda v, *, w: net.b(v).tanh() * w, net.a(x), w=2, use_reentrant=False),
    "sequential": lambda net, x: checkpoint_sequential([net.a, net.b, net.encoder], 2, net.a(x), use_reentrant=False),
    "in place": in_place,
    "autocast": with_autocast,
    "no_grad": partly_without_gradients,
    "two results": two_results,
}


def step(net: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    net.zero_grad()
    torch.manual_seed(1)
    out = net(x)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return {name: p.grad for name, p in net.named_parameters()}


def saved_bytes(net: nn.Module, call: Callable[[], Any]) -> int:
    """The memory of what a call keeps for its backward, the parameters apart."""
    known = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in known:
            kept[address] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def assert_close(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float = 1e-5) -> None:
    for name, old in expected.items():
        new = found[name]
        assert (new is None) == (old is None), name
        if new is not None and old is not None:
            torch.testing.assert_close(new, old, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("kind", BODIES)
def test_regions_recompute_in_the_graph_too(kind: str) -> None:
    torch.manual_seed(0)
    net = Net(BODIES[kind]).train()
    original = copy.deepcopy(net)
    fast = fxbt.optimize(net)
    xs = [torch.randn(2, 5, 8) for _ in range(2)]
    for x in xs:
        found, expected = step(fast, x), step(original, x)
    assert not fast.report.fallbacks
    assert fast.report.latest is not None
    assert_close(found, expected)
    assert saved_bytes(net, lambda: fast(xs[0])) == saved_bytes(original, lambda: original(xs[0]))


def test_dropout_is_the_same_in_the_recomputation() -> None:
    """Else the gradient would not be that of the output: linear in x, y = w(drop(x)) gives x.grad * x summing to y."""
    net = Net(lambda net, x: checkpoint(lambda v: net.drop(net.b(v).square()), net.a(x), use_reentrant=False), 0.5)
    with torch.no_grad():
        net.b.bias.zero_()
    fast = fxbt.optimize(net.train())
    for _ in range(3):
        net.zero_grad()
        out = fast(torch.randn(2, 5, 8))
        out.sum().backward()
        # out is homogeneous of degree two in b.weight
        assert net.b.weight.grad is not None
        torch.testing.assert_close((net.b.weight.grad * net.b.weight).sum(), 2 * out.sum(), rtol=1e-4, atol=1e-4)
    assert not fast.report.fallbacks
    assert fast.report.latest is not None


def test_without_gradients_there_is_nothing_to_recompute() -> None:
    net = Net(BODIES["layer"]).eval()
    fast = fxbt.optimize(net)
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(2, 5, 8)
            torch.testing.assert_close(fast(x), net.forward(x), rtol=1e-4, atol=1e-5)
    assert fast.report.hits["attention"] == 1


def test_a_checkpoint_that_chooses_what_it_keeps_is_refused() -> None:
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    net = Net(lambda net, x: checkpoint(net.encoder, net.a(x), use_reentrant=False, context_fn=contexts)).train()
    fast = fxbt.optimize(net)
    fast(torch.randn(2, 5, 8)).sum().backward()
    assert fast.report.latest is None
    assert "context_fn" in fast.report.fallbacks[0]


def test_a_reentrant_checkpoint_without_gradients_to_give_is_refused() -> None:
    net = Net(lambda net, x: checkpoint(net.encoder, x, use_reentrant=True) + net.a(x)).train()
    original = copy.deepcopy(net)
    fast = fxbt.optimize(net)
    x = torch.randn(2, 5, 8)
    assert_close(step(fast, x), step(original, x))
    assert net.encoder.linear1.weight.grad is None
    assert "use_reentrant" in fast.report.fallbacks[0]


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, attn_implementation="eager")),
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**SMALL, attn_implementation="eager")),
    "gpt2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32, attn_implementation="eager"
        )
    ),
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_enable(name: str, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    net = MODELS[name]().train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0 if isinstance(module.attention_dropout, float) else module.attention_dropout
    net.config.use_cache = False
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    original = copy.deepcopy(net)
    fast = fxbt.optimize(net)
    ids = torch.randint(0, 50, (2, 9))

    def gradients(model: nn.Module) -> dict[str, Tensor | None]:
        model.zero_grad()
        model(input_ids=ids, use_cache=False).last_hidden_state.pow(3).sum().backward()
        return {key: p.grad for key, p in model.named_parameters()}

    gradients(fast)
    assert not fast.report.fallbacks
    assert fast.report.hits["attention"] == 2
    assert_close(gradients(fast), gradients(original), tolerance=1e-4)

    def kept(model: nn.Module) -> int:
        return saved_bytes(model, lambda: model(input_ids=ids, use_cache=False))

    assert kept(fast) <= 1.3 * kept(original)
    net.gradient_checkpointing_disable()
    fast(input_ids=ids, use_cache=False)
    assert kept(fast) > 3 * kept(original)  # what the regions keep from being kept


def test_only_adapters_train_under_frozen_embeddings() -> None:
    """As with PEFT: transformers makes the embeddings' output require a gradient, else no region would have any."""
    net = MODELS["bert"]().train()
    net.requires_grad_(False)
    for layer in net.encoder.layer:
        layer.output.dense.weight.requires_grad_(True)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    net.enable_input_require_grads()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    original = copy.deepcopy(net)
    fast = fxbt.optimize(net)
    ids = torch.randint(0, 50, (2, 9))
    for _ in range(2):
        for model in (fast, original):
            model.zero_grad()
            model(input_ids=ids).last_hidden_state.pow(3).sum().backward()
    for p, q in zip(net.parameters(), original.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)
    assert not fast.report.fallbacks
    assert fast.report.hits["attention"] == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_a_model_that_has_its_own(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    net = Net(BODIES["layer"]).train()
    original = copy.deepcopy(net)
    fast = fxbt.optimize(net)
    for _ in range(2):
        x = torch.randn(2, 5, 8)
        for model in (fast, original):
            model.zero_grad()
            given = x.clone().requires_grad_()
            checkpoint(model, given, use_reentrant=use_reentrant).pow(3).sum().backward()
        found = {name: p.grad for name, p in net.named_parameters()}
        assert_close(found, {name: p.grad for name, p in original.named_parameters()}, tolerance=1e-4)
    assert fast.report.latest is not None
    assert not fast.report.fallbacks
