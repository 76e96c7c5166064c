"""Blocks by what was registered for them: where it runs, what is refused, and that the numbers stay."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CASES
from torch import Tensor, fx, nn

import fxbt
from fxbt.graph import lowerings
from fxbt.graph.lowerings import PARTS
from fxbt.lower.by_block import choose_lowerings, lower_blocks
from fxbt.rewrite.outline import inline

aten = torch.ops.aten
WIDTH, INNER = 8, 20

fxbt.block("swiglu", "silu(x gate^T + b) * (x up^T)")
fxbt.block("bounded_swiglu")


class SwiGLU(fxbt.Rule):
    """silu(x gate^T + bias) * (x up^T) as one node"""

    name = outline = "swiglu"
    makes = frozenset({"swiglu"})

    def pattern(self, op, x):
        gate = op.linear(x, op.weight("gate"), op.maybe(op.weight("bias")))
        return op.silu(gate) * op.linear(x, op.weight("up"))

    def check(self, m):
        m.bind(inner=int(m.up.shape[0]))


class Bounded(fxbt.Rule):
    """tanh(swiglu)"""

    name = outline = "bounded_swiglu"

    def pattern(self, op, x):
        return op.tanh(op.swiglu(x))


class FeedForward(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER, bias=bias), nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Encoder(nn.Module):
    """Two layers of masked attention and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, WIDTH)
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.blocks = nn.ModuleList(FeedForward() for _ in range(2))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.tokens(ids)
        for projection, block in zip(self.projections, self.blocks, strict=True):
            heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in projection(x).chunk(3, -1)]
            attended = F.scaled_dot_product_attention(*heads, mask[:, None, None, :])
            x = block(x + attended.transpose(1, 2).flatten(2))
        return x


def stacked(gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat([gate, up])


@pytest.fixture(autouse=True)
def none_registered(monkeypatch):
    monkeypatch.setattr(lowerings, "LOWERINGS", {})


@pytest.fixture
def shapes() -> list[tuple[int, ...]]:
    """Registers what computes the block in one product; the shapes it is called with."""
    called: list[tuple[int, ...]] = []

    @fxbt.lowering("swiglu", device="cpu", prepare={"both": stacked})
    def in_one_product(x, both, bias, inner):
        called.append(tuple(x.shape))
        gate, up = F.linear(x, both).split((inner, inner), -1)
        return F.silu(gate if bias is None else gate + bias) * up

    return called


def optimized(model: nn.Module, *inputs: Tensor, rules: Any = None) -> Any:
    fast = fxbt.optimize(model, rules=rules or [SwiGLU()])
    with torch.no_grad():
        fast.warmup(*inputs)
    return fast


def agree(fast: nn.Module, model: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_training", [True, False])
def test_it_runs_in_the_place_of_its_block(bias, is_training, shapes):
    model = nn.Sequential(FeedForward(bias), FeedForward(bias)).train(is_training)
    fast = optimized(model, torch.randn(2, 5, WIDTH))
    assert fast.report.hits["lowering"] == 2 and not fast.report.fallbacks
    assert [entry.name for entry in fast.report.latest.module.graph.nodes].count("swiglu") == 1  # as a block still
    shapes.clear()
    for shape in ((2, 5), (2, 5), (1, 1), (3, 9)):
        agree(fast, model, torch.randn(*shape, WIDTH))
        assert shapes[-2:] == [(*shape, WIDTH)] * 2
    assert not fast.report.fallbacks


def test_what_it_prepares_follows_the_weights(shapes):
    made: list[Tensor] = []

    def spy(gate, up):
        made.append(gate)
        return stacked(gate, up)

    @fxbt.lowering("swiglu", device="cpu", prepare={"both": spy})
    def again(x, both, bias, inner):
        gate, up = F.linear(x, both).split((inner, inner), -1)
        return F.silu(gate + bias) * up

    model = FeedForward()
    fast = optimized(model, torch.randn(2, 5, WIDTH))
    agree(fast, model, torch.randn(2, 5, WIDTH))
    made.clear()
    agree(fast, model, torch.randn(3, 5, WIDTH))
    assert not made
    with torch.no_grad():
        model.gate.weight.mul_(2), model.up.weight.add_(1), model.gate.bias.add_(3)
    for _ in range(2):
        agree(fast, model, torch.randn(3, 5, WIDTH))
    assert len(made) == 1
    model.load_state_dict(FeedForward().state_dict())
    agree(fast, model, torch.randn(3, 5, WIDTH))
    assert len(made) == 2 and not fast.report.fallbacks


def test_with_gradients_the_block_runs(shapes):
    model = FeedForward()
    fast = fxbt.optimize(model, rules=[SwiGLU()])
    for rows in (2, 3):
        x = torch.randn(rows, 5, WIDTH)
        grads = [torch.autograd.grad(each(x).square().sum(), list(each.parameters())) for each in (fast, model)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert fast.report.hits["swiglu"] == 1 and "lowering" not in fast.report.hits and not shapes


def test_padding_is_dropped_with_it(shapes):
    model = Encoder().eval()
    ids, mask = torch.randint(0, 30, (3, 6)), torch.arange(6) < torch.tensor([[6], [2], [3]])
    fast = optimized(model, ids, mask)
    assert fast.report.hits["lowering"] == 2 and fast.report.hits["padding"] == 1
    for lengths in ([6, 2, 3], [1, 1, 2]):
        mask = torch.arange(6) < torch.tensor(lengths)[:, None]
        shapes.clear()
        with torch.no_grad():
            torch.testing.assert_close(fast(ids, mask)[mask], model(ids, mask)[mask], rtol=1e-5, atol=1e-5)
        assert shapes == [(1, sum(lengths), WIDTH)] * 2
    shapes.clear()
    agree(fast, model, ids, torch.ones(3, 6, dtype=torch.bool))
    assert shapes == [(3, 6, WIDTH)] * 2
    assert {"packed", "dense"} <= {way for way, count in fast.report.latest.calls.items() if count}


# --- by its graph -----------------------------------------------------------------------------------------------


@pytest.fixture
def graphs() -> list[fx.GraphModule]:
    """Registers the graph of a built-in block as what computes it; the graphs that are given."""
    given: list[fx.GraphModule] = []

    def as_it_is(graph: fx.GraphModule) -> Callable[..., Tensor]:
        given.append(graph)
        return graph

    for name in ("mlp", "encoder_layer", "residual_norm"):
        fxbt.lowering(name, device="cpu", takes_graph=True)(as_it_is)
    return given


def test_built_in_blocks_go_to_another_compiler_as_graphs(graphs):
    case = next(case for case in CASES if case.name == "bert")
    model: Any = case.build("sdpa").eval()
    padded = case.inputs(3, 16, "right")
    fast: Any = fxbt.optimize(model)
    calls: list[str] = []
    with torch.no_grad():
        fast(**padded)
        for graph in graphs:
            graph.register_forward_hook(lambda graph, *call: calls.append(type(graph).__name__))
        layer = next(graph for graph in graphs if type(graph).__name__ == "encoder_layer")
        assert all("val" in node.meta for node in layer.graph.nodes if node.op != "output")
        for inputs in (case.inputs(3, 16, "none"), padded, case.inputs(2, 9, "right"), case.inputs(2, 9, "none")):
            calls.clear()
            found, expected = fast(**inputs).last_hidden_state, model(**inputs).last_hidden_state
            is_token = inputs["attention_mask"].bool()
            torch.testing.assert_close(found[is_token], expected[is_token], rtol=1e-5, atol=1e-5)
            # Without padding whole layers run so, their masks taken; packed, attention is another, and the MLPs do.
            name = "encoder_layer" if is_token.all() else "mlp"
            assert [call for call in calls if call != "residual_norm"] == [name] * model.config.num_hidden_layers
    assert {"packed", "dense"} <= {way for way, count in fast.report.latest.calls.items() if count}
    assert not fast.report.fallbacks


def test_a_compiler_that_fails_on_a_graph_made_later_costs_that_graph():
    tried: list[str] = []

    @fxbt.lowering("encoder_layer", device="cpu", takes_graph=True)
    def choosy(graph: fx.GraphModule) -> Callable[..., Tensor]:
        tried.append(str(graph.graph))
        if "is_causal" in tried[-1] and len(tried) > 1:
            raise NotImplementedError("no such attention")
        return graph

    case = next(case for case in CASES if case.name == "bert")
    model: Any = case.build("sdpa").eval()
    model.encoder.layer = model.encoder.layer[:1]
    fast: Any = fxbt.optimize(model)
    for inputs in (case.inputs(3, 16, "right"), case.inputs(2, 9, "none")):
        with torch.no_grad():
            torch.testing.assert_close(
                fast(**inputs).last_hidden_state, model(**inputs).last_hidden_state, rtol=1e-5, atol=1e-5
            )
    assert len(tried) == 2 and "no such attention" in str(fast.report.why("padding"))
    assert fast.report.hits["lowering"] == 1 and not fast.report.fallbacks


def test_a_compiled_graph_follows_the_weights(graphs):
    fxbt.lowering("mlp", device="cpu", takes_graph=True)(lambda graph: torch.compile(graph, backend="eager"))
    model = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH), nn.Tanh())
    fast = optimized(model, torch.randn(2, 5, WIDTH))
    assert fast.report.hits["lowering"] == 1
    for shape in ((2, 5), (3, 7)):
        agree(fast, model, torch.randn(*shape, WIDTH))
        with torch.no_grad():
            model[0].weight.mul_(2)
        agree(fast, model, torch.randn(*shape, WIDTH))
    assert not fast.report.fallbacks


def test_a_compiler_that_computes_something_else_is_refused():
    def other(graph: fx.GraphModule) -> Callable[..., Tensor]:
        for node in graph.graph.nodes:
            node.target = aten.relu.default if node.target is aten.gelu.default else node.target
        graph.recompile()
        return graph

    fxbt.lowering("mlp", device="cpu", takes_graph=True)(other)
    model = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH), nn.Tanh())
    fast = optimized(model, torch.randn(2, 5, WIDTH))
    assert "changes the values" in str(fast.report.why("lowering"))
    agree(fast, model, torch.randn(3, 5, WIDTH))


# --- which one --------------------------------------------------------------------------------------------------


def register(says: list[str], name: str, **options: Any) -> None:
    @fxbt.lowering("swiglu", **{"device": "cpu", **options})
    def lowered(x, gate, up, bias):
        says.append(name)
        return F.silu(F.linear(x, gate, bias)) * F.linear(x, up)


def test_any_callable_will_do():
    class Kernel:
        def __call__(self, x, gate, up, bias):
            return exact(x, gate, up, bias)

    for function in (Kernel(), functools.partial(exact)):
        fxbt.lowering("swiglu", device="cpu")(function)
        model = FeedForward()
        fast = optimized(model, torch.randn(2, 5, WIDTH))
        assert fast.report.hits["lowering"] == 1
        agree(fast, model, torch.randn(3, 5, WIDTH))
        assert not fast.report.fallbacks


def test_the_device_and_the_dtype_choose():
    says: list[str] = []
    register(says, "cuda", device="cuda")
    register(says, "doubles", dtype=torch.float64)
    fast = optimized(FeedForward(), torch.randn(2, 5, WIDTH))
    assert "lowering" not in fast.report.hits
    register(says, "any")
    for dtype, name in ((torch.float32, "any"), (torch.float64, "doubles")):
        x, model = torch.randn(2, 5, WIDTH, dtype=dtype), FeedForward().to(dtype)
        fast = optimized(model, x)
        says.clear()
        agree(fast, model, x)
        assert says == [name]


def test_the_one_registered_last_stands_for_one_before():
    says: list[str] = []
    register(says, "first")
    register(says, "second")
    optimized(FeedForward(), torch.randn(2, 5, WIDTH))
    assert set(says) == {"second"}


def test_a_block_around_another_comes_first(shapes):
    class Model(FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.tanh(F.silu(self.gate(x)) * self.up(x)))

    model, x = Model(), torch.randn(2, 5, WIDTH)
    rules = [SwiGLU(), Bounded()]
    fast = optimized(model, x, rules=rules)
    shapes.clear()
    agree(fast, model, x)
    assert fast.report.hits["bounded_swiglu"] == 1 and shapes == [(2, 5, WIDTH)]  # the inner one, as there is no other

    @fxbt.lowering("bounded_swiglu", device="cpu")
    def ignorant(x):
        raise AssertionError("not tried: the block reads weights too")

    fast = optimized(model, x, rules=rules)
    assert "does not take everything that the block reads" in str(fast.report.why("lowering"))
    shapes.clear()
    agree(fast, model, x)
    assert shapes


# --- what is refused --------------------------------------------------------------------------------------------


def exact(x, gate, up, bias):
    return F.silu(F.linear(x, gate, bias)) * F.linear(x, up)


def without_bias(x, gate, up):
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def writing(x, gate, up, bias):
    result = exact(x, gate, up, bias)
    gate.zero_()
    return result


def laid_out_otherwise(x, gate, up, bias):
    return exact(x, gate, up, bias).transpose(0, 1).contiguous().transpose(0, 1)


def in_view_of(x, gate, up, bias):
    return x[..., :1].expand(*x.shape[:-1], INNER)


def failing(x, gate, up, bias):
    raise ValueError("no such kernel")


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "other numbers": (lambda x, gate, up, bias: exact(x, gate, up, bias) * 1.001, "changes the values"),
    "another shape": (lambda x, gate, up, bias: exact(x, gate, up, bias)[:1], "another shape"),
    "another dtype": (lambda x, gate, up, bias: exact(x, gate, up, bias).double(), "another shape"),
    "two results": (lambda x, gate, up, bias: (exact(x, gate, up, bias),) * 2, "another shape"),
    "another layout": (laid_out_otherwise, "another shape, dtype, device or layout"),
    "an operand left out": (without_bias, "does not take everything that the block reads"),
    "an unknown operand": (lambda x, gate, up, bias, scale: x, "takes 'scale'"),
    "written to": (writing, "writes to its arguments"),
    "no memory of its own": (in_view_of, "another shape, dtype, device or layout"),
    "failing": (failing, "ValueError: no such kernel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_its_block_is_refused(name):
    function, reason = REFUSED[name]
    fxbt.lowering("swiglu", device="cpu")(function)
    model = FeedForward()
    with torch.no_grad():
        model.gate.bias.zero_()  # what leaves it out is refused all the same
    fast = optimized(model, torch.randn(2, 5, WIDTH))
    assert fast.report.hits["lowering"] == 0 and bool(model.gate.weight.any())
    assert reason in str(fast.report.why("lowering"))
    for rows in (2, 3):
        agree(fast, model, torch.randn(rows, 5, WIDTH))
    assert not fast.report.fallbacks


def test_what_returns_what_it_is_given_is_refused():
    fxbt.block("doubled_half")

    class Doubled(fxbt.Rule):
        """relu(relu(x)) is relu(x), but a tensor of its own"""

        name = outline = "doubled_half"

        def pattern(self, op, x):
            return op.relu(x)

    fxbt.lowering("doubled_half", device="cpu")(lambda x: x)
    model = nn.ReLU()
    fast = optimized(model, torch.rand(2, 5), rules=[Doubled()])
    assert "returns memory of its arguments" in str(fast.report.why("lowering"))


def test_what_draws_random_numbers_is_not_tried(shapes):
    class Model(FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.dropout(F.silu(self.gate(x)), 0.5, self.training) * self.up(x))

    for is_training in (True, False):
        model, x = Model().train(is_training), torch.randn(2, 5, WIDTH)
        shapes.clear()
        fast = optimized(model, x)
        assert bool(shapes) == (not is_training)
        agree(fast.eval(), model.eval(), x)


def test_a_failure_later_is_not_the_callers():
    @fxbt.lowering("swiglu", device="cpu")
    def only_two(x, gate, up, bias):
        if len(x) != 2:
            raise ValueError("two sequences, please")
        return exact(x, gate, up, bias)

    model = FeedForward()
    fast = optimized(model, torch.randn(2, 5, WIDTH))
    agree(fast, model, torch.randn(2, 5, WIDTH))
    with pytest.warns(fxbt.FxbtWarning, match="runs its original forward"):
        agree(fast, model, torch.randn(3, 5, WIDTH))
    assert "two sequences, please" in str(fast.report.fallbacks)


def test_names_that_cannot_work_are_errors_at_once():
    with pytest.raises(fxbt.RuleError, match=r"lowering of 'swigloo'.*fxbt\.ops.*mlp"):
        fxbt.lowering("swigloo", device="cpu")
    with pytest.raises(fxbt.RuleError, match="prepare has 'both', which the function does not take"):
        fxbt.lowering("swiglu", device="cpu", prepare={"both": stacked})(exact)
    for name in ("linear", "attention", "mlp", "two words"):
        with pytest.raises(fxbt.RuleError, match="cannot be called"):
            fxbt.block(name)
    assert fxbt.block("swiglu") is fxbt.ops.swiglu is fxbt.block("swiglu", "again")
    with pytest.raises(AttributeError, match="no 'swigloo'"):
        _ = fxbt.ops.swigloo


# --- whole or not -----------------------------------------------------------------------------------------------


def whole() -> fx.GraphModule:
    """The inlined graph of a model whose block has a lowering."""
    fxbt.lowering("swiglu", device="cpu")(exact)
    x = torch.randn(2, 5, WIDTH)
    module = inline(optimized(FeedForward(), x).report.latest.module)
    with torch.no_grad():
        record = choose_lowerings(module, [x])
    assert record is not None and record.hits == 1
    return module


def lowered_in(graph: fx.Graph) -> int:
    lower_blocks(graph)
    graph.lint()
    return sum(node.target is exact for node in graph.nodes)


def the(graph: fx.Graph, target: Any) -> fx.Node:
    return next(node for node in graph.nodes if node.target is target)


def reads_it_inside(graph: fx.Graph) -> None:
    output = graph.output_node()
    output.args = ((*output.args[0], the(graph, aten.silu.default)),)  # type: ignore[misc]


def changes_an_operand(graph: fx.Graph) -> None:
    """The two linears are of different values."""
    linear = the(graph, aten.linear.default)
    with graph.inserting_before(linear):
        linear.update_arg(0, graph.call_function(aten.neg.default, (linear.args[0],)))


def changes_an_op(graph: fx.Graph) -> None:
    the(graph, aten.silu.default).target = aten.relu.default


def adds_an_argument(graph: fx.Graph) -> None:
    mul = the(graph, aten.mul.Tensor)
    mul.update_arg(1, 2)


def takes_a_part(graph: fx.Graph) -> None:
    del the(graph, aten.silu.default).meta[PARTS]


def doubles_a_part(graph: fx.Graph) -> None:
    silu = the(graph, aten.silu.default)
    with graph.inserting_after(silu):
        graph.node_copy(silu)


@pytest.mark.parametrize(
    "change", [reads_it_inside, changes_an_operand, changes_an_op, adds_an_argument, takes_a_part, doubles_a_part]
)
def test_a_block_that_is_not_whole_any_more_stays(change):
    graph = whole().graph
    assert lowered_in(copy.deepcopy(graph)) == 1
    change(graph)
    assert lowered_in(graph) == 0


def test_where_the_operands_are_others_those_are_taken():
    module = whole()
    graph = module.graph
    linears = [node for node in graph.nodes if node.target is aten.linear.default][:2]
    with graph.inserting_before(linears[0]):
        turned = graph.call_function(aten.neg.default, (linears[0].args[0],))
    for linear in linears:
        linear.update_arg(0, turned)
    module.recompile()
    x = torch.randn(3, 4, WIDTH)
    expected = module(x)
    assert lowered_in(graph) == 1
    module.recompile()
    torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6)
