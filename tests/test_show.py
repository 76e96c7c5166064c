"""Graph texts are stable and exact, and their difference shows what changed and nothing else."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch.export import Dim, export

import fxbt
from fxbt.explain import show
from fxbt.explain.graph_report import GraphReport
from fxbt.graph import record
from fxbt.graph.record import Snapshot


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
    made.meta[record.RULE] = "qkv"
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


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / x.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask[:, None, :], -1e9).softmax(-1)
        return self.norm(x + self.out(weights @ self.value(x)))


class Layers(nn.Module):
    def __init__(self, layers: int, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


def layers(count: int, batch: int = 2, length: int = 3) -> GraphReport:
    inputs = (torch.ones(batch, length, 8), torch.ones(batch, length, dtype=torch.bool))
    with torch.no_grad():
        report = fxbt.optimize(Layers(count).eval(), inputs).report.latest
    assert report is not None
    return report


def bert(count: int, **call: bool) -> GraphReport:
    config = transformers.BertConfig(
        num_hidden_layers=count, hidden_size=24, num_attention_heads=2, intermediate_size=48, vocab_size=99
    )
    model = transformers.BertModel._from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(8).view(2, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **call}
    with torch.no_grad():
        report = fxbt.optimize(model, inputs).report.latest
    assert report is not None
    return report


def page(report: GraphReport) -> str:
    parts = {"before": report.before, "after": report.after, "diff": report.diff()}
    return "\n\n".join(f"== {title}\n{text}" for title, text in parts.items())


@pytest.mark.parametrize(("batch", "length"), [(2, 3), (5, 4)])
def test_golden_two_layers(golden: Callable[[str, str], None], batch: int, length: int) -> None:
    golden("two_layers", page(layers(2, batch, length)))


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 builds its masks by other ops")
def test_golden_bert(golden: Callable[[str, str], None]) -> None:
    golden("bert_3_layers", page(bert(3)))


def test_twelve_layers_read_on_one_screen() -> None:
    report = bert(12)
    assert report.nodes_before > 250
    assert len(report.after.splitlines()) < 60
    assert len(report.diff().splitlines()) < 80
    assert "x 12  # encoder.layer.0..11" in report.before and "x 12  # encoder.layer.0..11" in report.after
    assert "attention at encoder.layer.0..11.attention.self, x 12" in report.diff()


def test_in_full_nothing_is_folded() -> None:
    graph = layers(3).captured
    folded, full = show.text(graph), show.text(graph, collapse=False)
    assert "x 3  # layers.0..2" in folded and "x 3" not in full
    assert full.count("softmax(") == 3 and folded.count("softmax(") == 1


def test_a_layer_wired_otherwise_is_not_folded() -> None:
    class Skip(Layers):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            seen = [x]
            for i, layer in enumerate(self.layers):
                seen.append(layer(seen[-2 if i == 2 else -1], mask))
            return torch.cat(seen)

    inputs = (torch.ones(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    with torch.no_grad():
        text = fxbt.optimize(Skip(4).eval(), inputs).report.before
    assert text.count("x 2  # layers.") == 2 and "x 3" not in text and "x 4" not in text


def test_a_snapshot_stays_as_it_was() -> None:
    module = graph_of(Small(), torch.ones(2, 3, 4), torch.ones(2, 5, 4))
    before = Snapshot(module.graph)
    relu = next(node for node in module.graph.nodes if node.op == "call_function" and "relu" in node.name)
    relu.replace_all_uses_with(relu.args[0])
    module.graph.erase_node(relu)
    assert show.text(before) == SMALL
    assert show.text(module) != SMALL


def test_numbers_of_layers_in_one_place() -> None:
    assert show.common_place(["a.0.b", "a.1.b", "a.2.b"]) == "a.0..2.b"
    assert show.common_place(["a.0", "a.2"]) == "a.0,2"
    assert show.common_place(["a.0.b.1", "a.1.b.2"]) == "a.0.b.1"
    assert show.common_place(["a.0", "a.1.b"]) == "a.0"
    assert show.common_place(["a.b"]) == "a.b"
