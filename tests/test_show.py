"""Graph texts are stable and exact, and their difference shows what changed and nothing else."""

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export

from fxbt import show


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.second(torch.relu(self.first(x)))
        top = hidden.view(x.shape[0] * x.shape[1], 4) * self.scale
        return torch.cat([hidden, y], 1), top[1:].sum(0) * 0.125


def graph_of(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    dims = tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in inputs)
    module = export(model, inputs, dynamic_shapes=dims, strict=False).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


SMALL = """\
%x = input -> f32[s0, s1, 4]
%y = input -> f32[s0, s2, 4]
%linear_0 = linear(%x, .weight, .bias) -> f32[s0, s1, 8]  # first
%relu_0 = relu(%linear_0) -> f32[s0, s1, 8]
%linear_1 = linear(%relu_0, .weight, .bias) -> f32[s0, s1, 4]  # second
%view_0 = view(%linear_1, [s0*s1, 4]) -> f32[s0*s1, 4]
%mul_0 = mul(%view_0, scale) -> f32[s0*s1, 4]
%cat_0 = cat([%linear_1, %y], 1) -> f32[s0, s1 + s2, 4]
%slice_0 = slice(%mul_0, 0, 1, end) -> f32[s0*s1 - 1, 4]
%sum_0 = sum(%slice_0, [0]) -> f32[4]
%mul_1 = mul(%sum_0, 0.125) -> f32[4]
return (%cat_0, %mul_1)"""


def test_golden() -> None:
    assert show.text(graph_of(Small(), torch.ones(2, 3, 4), torch.ones(2, 5, 4))) == SMALL


def test_the_same_text_for_every_capture() -> None:
    texts = {
        show.text(graph_of(Small(), torch.ones(b, s, 4), torch.ones(b, t, 4)))
        for b, s, t in [(2, 3, 5), (7, 6, 2), (3, 4, 9)]
    }
    assert texts == {SMALL}


def test_inputs_named_like_results_keep_their_names() -> None:
    graph = fx.Graph()
    taken = graph.placeholder("relu_0")
    graph.output(graph.call_function(torch.relu, (taken,)))
    text = show.text(fx.GraphModule(nn.Module(), graph))
    assert text == "%relu_0 = input\n%relu_1 = relu(%relu_0)\nreturn %relu_1"


def test_the_rule_that_made_a_node_is_named() -> None:
    module = graph_of(Small(), torch.ones(2, 3, 4), torch.ones(2, 5, 4))
    made = next(node for node in module.graph.nodes if node.op == "call_function" and "linear" in node.name)
    made.meta[show.RULE_KEY] = "qkv"
    assert "-> f32[s0, s1, 8]  # first  [qkv]" in show.text(module)


def test_values_of_all_kinds() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    values = (
        (1, None),
        slice(0, None, 2),
        torch.float16,
        torch.device("cpu"),
        1e-12,
        2.0,
        float("-inf"),
        True,
    )
    graph.output(graph.call_function(max, (x, values), {"key": "name", "memory": torch.contiguous_format}))
    line = show.text(fx.GraphModule(nn.Module(), graph)).splitlines()[1]
    shown = "((1, None), 0:None:2, f16, cpu, 1e-12, 2.0, -inf, True)"
    assert line == f"%max_0 = max(%x, {shown}, key=name, memory=contiguous_format)"


def test_diff_of_equal_texts_is_empty() -> None:
    assert show.diff(SMALL, SMALL) == ""


def test_diff_shows_a_removed_op_and_its_users_only() -> None:
    lines = SMALL.splitlines()
    before = [*lines[:2], "%linear_0 = linear(%x, .weight) -> f32[s0, s1, 4]  # extra"]
    for line in lines[2:]:
        before.append(line.replace("linear_1", "linear_2").replace("linear_0", "linear_1"))
    before[3] = before[3].replace("(%x", "(%linear_0")
    changed = [line for line in show.diff("\n".join(before), SMALL).splitlines() if line[0] in "+-"]
    assert changed == [
        "--- before",
        "+++ after",
        "-%linear_0' = linear(%x, .weight) -> f32[s0, s1, 4]  # extra",
        "-%linear_0 = linear(%linear_0', .weight, .bias) -> f32[s0, s1, 8]  # first",
        "+%linear_0 = linear(%x, .weight, .bias) -> f32[s0, s1, 8]  # first",
    ]


def test_diff_sees_swapped_operands_of_the_same_op() -> None:
    head = "%x = input\n%relu_0 = relu(%x)  # a\n%relu_1 = relu(%x)  # b\n"
    diff = show.diff(head + "%sub_0 = sub(%relu_0, %relu_1)", head + "%sub_0 = sub(%relu_1, %relu_0)")
    assert "-%sub_0 = sub(%relu_0, %relu_1)\n+%sub_0 = sub(%relu_1, %relu_0)" in diff
