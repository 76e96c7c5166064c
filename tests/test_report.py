"""The report says what was done, why not, and for how long, from the records that the pipeline leaves."""

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import fxbt
from fxbt.capture.effects import Effects
from fxbt.explain.report import Report
from fxbt.graph.miss import Miss
from fxbt.graph.record import Rewrite, Snapshot, StageRecord
from fxbt.runtime.compiled import Compiled, History


def miss(rule: str, where: str, reason: str, expected: str = "", found: str = "", **more: Any) -> Miss:
    made = Miss(reason, expected=expected, found=found, **more)
    made.rule, made.where = rule, where
    return made


def graph(function: Any, where: str = "") -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(function, (x,))
    node.meta["nn_module_stack"] = {"key": (where, nn.Module)}
    graph.output((node,))
    return graph


def returned(misses: int = 5) -> list[Miss]:
    return [
        miss("attention", f"encoder.layer.{i}", "the weights are returned", "one user", "%output")
        for i in range(misses)
    ]


def filled(misses: list[Miss] | None = None, fired: tuple[str, ...] = ("encoder.layer.7",), **changes: Any) -> Report:
    report = Report()
    add(report, returned() if misses is None else misses, fired, **changes)
    return report


def add(report: Report, misses: list[Miss], fired: tuple[str, ...] = (), signature: str = "x: f32[2, 3]") -> None:
    before, after = graph(torch.relu, "encoder.layer.3"), graph(torch.abs, "encoder.layer.1")
    module = fx.GraphModule(nn.Module(), after)
    stages = [
        StageRecord("attention", list(fired), [], misses, seconds=0.02, nodes_before=30, nodes_after=25),
        StageRecord("qkv", seconds=0.001, nodes_before=25, nodes_after=25),
    ]
    history = History(module, module, Snapshot(before), Snapshot(after), stages, StageRecord("parts", [""]))
    compiled = Compiled(
        run=module,
        dense=SimpleNamespace(replay=None, regions=[]),  # type: ignore[arg-type]
        unpadding=None,
        tell=lambda: history,
        seconds=0.5,
        stochastic=False,
        derived_bytes=3 * 2**20,
        measure=lambda: 5 * 2**20,
        weights=None,
    )
    report.add_graph(
        signature, SimpleNamespace(effects=Effects(), seconds=1.25, out_spec=pytree.tree_structure((0,))), compiled
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("ask", ["before", "after", "diff", "why", "str"])
def test_nothing_captured_yet_says_what_to_do(ask: str) -> None:
    report = Report()
    texts = {"before": report.before, "after": report.after, "diff": report.diff(), "str": str(report)}
    text = texts.get(ask) or report.why("attention")
    assert "nothing is captured yet: call the model, or fast.warmup(...)" in text
    assert report.hits == {} and report.misses == []


def test_it_speaks_of_the_latest_graph() -> None:
    report = filled()
    add(report, [], ("a", "b"), "x: f32[2, 3, 4]")
    assert report.hits == {"attention": 2, "qkv": 0}
    assert report.misses == []
    assert report.before == "%x = input\n%relu_0 = relu(%x)  # encoder.layer.3\nreturn (%relu_0)"
    assert report.after == "%x = input\n%abs_0 = abs(%x)  # encoder.layer.1\nreturn (%abs_0)"
    assert list(report.graphs) == ["x: f32[2, 3]", "x: f32[2, 3, 4]"]


def test_two_graphs_of_one_signature_are_both_kept() -> None:
    report = filled()
    add(report, [])
    assert list(report.graphs) == ["x: f32[2, 3]", "x: f32[2, 3] (2)"]
    assert report.hits == {"attention": 0, "qkv": 0}


def test_the_tables() -> None:
    text = str(filled())
    assert "x: f32[2, 3]  3 -> 3" in text
    assert "1.25" in text
    assert "3.0" in text
    assert "attention 1 5 0.02" in " ".join(text.split())
    assert "the original forward" not in text


def test_a_repeated_layer_misses_once() -> None:
    text = str(filled())
    assert text.count("the weights are returned") == 1
    assert "attention: nearest miss of 5, at encoder.layer.0..4" in text


def test_only_the_first_kinds_of_misses_are_printed() -> None:
    text = str(filled([miss("attention", "layer", f"reason {i}") for i in range(12)]))
    assert "reason 7" in text
    assert "reason 8" not in text
    assert "4 more kinds: see report.why(rule)" in text


def test_refusals_and_fallbacks_are_named_once_each() -> None:
    refusal = miss("attention", "layer", "differs by 0.3")
    refusal.refused = True
    report = filled([refusal])
    for _ in range(3):
        report.add_fallback("argument past_key_values holds a DynamicCache")
    assert report.fallbacks == ["argument past_key_values holds a DynamicCache"]
    text = str(report)
    assert "rewrites refused by verification\nattention: refused, at layer\n  reason    differs by 0.3" in text
    assert "near misses\n" not in text
    assert "the original forward ran because\n- argument past_key_values holds a DynamicCache" in text


def test_why_shows_the_near_miss_with_expected_and_found() -> None:
    assert filled().why("attention", at="encoder.layer.3").splitlines() == [
        "attention: one miss, at encoder.layer.3",
        "  reason    the weights are returned",
        "  expected  one user",
        "  found     %output",
    ]


def test_why_shows_the_nearest_as_in_the_design() -> None:
    misses = [miss("layer", f"encoder.layer.{i}", "", "a softmax", "%relu", matched=2, total=14) for i in range(11)]
    nearest = {"matched": 9, "total": 14, "hint": "output_hidden_states=False"}
    misses.insert(3, miss("layer", "encoder.layer.3", "", "add(x, a) used once", "%add_5 is used twice", **nearest))
    for one in misses:
        one.rule = "attention"
    assert filled(misses, fired=()).why("attention").splitlines() == [
        "attention: nearest miss of 12, at encoder.layer.3, 9 of 14 matched",
        "  expected  add(x, a) used once",
        "  found     %add_5 is used twice",
        "  hint      output_hidden_states=False",
        "and 11 that matched less: see report.misses",
    ]


def test_why_keeps_ties_in_the_order_of_the_graph() -> None:
    misses = [miss("attention", "encoder", reason, matched=1, total=2) for reason in ("b", "a", "b")]
    text = filled(misses, fired=()).why("attention")
    assert [line.split()[-1] for line in text.splitlines() if "reason" in line] == ["b", "a"]


def test_why_takes_whole_module_names() -> None:
    text = filled([miss("attention", "encoder.layer.10", "ten")]).why("attention", at="encoder.layer.1")
    assert text == "attention found no op to start from at encoder.layer.1; it fired 1 times elsewhere"


def test_why_of_a_rule_that_fired() -> None:
    fired = tuple(f"encoder.layer.{i}" for i in (1, 2, 3))
    assert filled([], fired).why("attention") == "attention fired 3 times, at encoder.layer.1..3"
    assert filled([], fired).why("attention", "encoder.layer.3") == "attention fired once, at encoder.layer.3"
    mixed = filled(fired=fired).why("attention", at="encoder.layer.3").splitlines()
    assert mixed[:2] == ["attention fired once, at encoder.layer.3", "attention: one miss, at encoder.layer.3"]


def test_why_of_what_does_not_exist_lists_what_does() -> None:
    answer = filled().why("rotary")
    assert answer == "no rule 'rotary' ran on this graph; the rules that ran: attention, qkv"
    answer = filled().why("attention", at="encoder.layers.3")
    assert answer.startswith("no operation of this graph is inside 'encoder.layers.3'; did you mean encoder.layer.3")


def test_a_miss_names_nodes_when_it_is_read_and_not_before() -> None:
    report = filled([])
    assert report.latest is not None
    old, new = report.latest.captured.entries[1].node, report.latest.rewritten.entries[1].node
    asked = miss("attention", "encoder", "")
    made = Miss("", node=old, found=(old, "is also used by", new), expected="one use")
    made.rule, made.where = "attention", "encoder"
    report.latest.stages[0].misses += [asked, made]
    old.meta["val"] = torch.empty(2, 3)
    assert "found     %relu_0' f32[2, 3] at encoder.layer.3 is also used by %abs_0" in report.why("attention")
    assert "found     %relu f32[2, 3] at encoder.layer.3 is also used by %abs_1 at" in str(made)


def test_a_miss_outlives_its_node() -> None:
    lost = graph(torch.relu, "encoder.layer.3")
    node = list(lost.nodes)[1]
    node.meta["val"] = torch.empty(2, 3)
    node.meta["stack_trace"] = (
        f'  File "/home/me/model.py", line 12, in forward\n    x = relu(x)\n  File "{torch.__file__}", line 3, in f\n'
    )
    made = Miss("gone", node=node)
    lost.output_node().args = ()
    lost.erase_node(node)
    assert made.found == "%relu f32[2, 3] at encoder.layer.3 (model.py:12)"
    assert str(made) == "rule: gone\n  found     %relu f32[2, 3] at encoder.layer.3 (model.py:12)"


def test_diff_shows_what_went_and_what_came() -> None:
    report = filled([])
    assert report.latest is not None
    stage = report.latest.stages[0]
    for i in range(2):
        before, after = graph(torch.relu, f"layer.{i}.act"), graph(torch.abs, f"layer.{i}")
        old, new = (Snapshot(g).entries[1] for g in (before, after))
        stage.rewrites.append(Rewrite("attention", f"layer.{i}", (old,), (new,), ((old.node, new.node),)))
    assert report.diff().splitlines() == [
        "attention at layer.0..1, x 2",
        "-%relu_0 = relu(%x)  # .act",
        "+%relu_0 = abs(%x)",
    ]


def fired(report: Report) -> dict[str, int]:
    return {rule: count for rule, count in report.hits.items() if count}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 8**0.5
        return scores.softmax(-1) @ self.value(x)


def test_a_real_model_gives_the_same_texts_for_every_example() -> None:
    reports = []
    with torch.no_grad():
        for batch, length in [(2, 3), (5, 4), (1, 7)]:
            reports.append(fxbt.optimize(Attention().eval(), (torch.ones(batch, length, 8),)).report)
    assert len({(report.before, report.after) for report in reports}) == 1
    report = reports[0]
    assert fired(report) == {"attention": 1, "qkv": 1}
    assert "-%softmax_0 = softmax(" in report.diff()
    assert "[qkv]" in report.after
    assert report.why("attention") == "attention fired once, at the top"
    (graph,) = report.graphs.values()
    assert isinstance(graph.module, fx.GraphModule)


@pytest.fixture(scope="module")
def tiny_bert() -> nn.Module:
    config = transformers.BertConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    config._attn_implementation = "eager"
    return transformers.BertModel(config).eval()


def test_a_real_near_miss_names_the_models_own_line() -> None:
    class Returning(Attention):
        def forward(self, x: Tensor) -> Any:
            scores = (self.query(x) @ self.key(x).transpose(1, 2) / 8**0.5).softmax(-1).tanh()
            return scores @ self.value(x)

    with torch.no_grad():
        report = fxbt.optimize(Returning().eval(), (torch.ones(2, 3, 8),)).report
    (only,) = (miss for miss in report.misses if miss.rule == "attention")
    assert only.node is not None
    assert "found     %tanh_0 f32[s0, s1, s1] (test_report.py:" in report.why("attention")
    assert only.__traceback__ is None


def test_a_value_that_is_returned_is_named_with_what_to_ask(tiny_bert: nn.Module) -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    with torch.no_grad():
        report = fxbt.optimize(tiny_bert, {"input_ids": ids, "output_attentions": True}).report
    text = re.sub(r"\.py:\d+", ".py:0", report.why("attention"))
    text = re.sub(r"%clone_0 (.*)\.dropout", r"%softmax_0 \1", text)  # transformers 4: by a module that does nothing
    assert text.splitlines() == [
        "attention: nearest miss of 2, at encoder.layer.0..1.attention.self",
        "  reason    the attention weights are used elsewhere too",
        "  expected  one use: the value product",
        "  found     %softmax_0 f32[s0, 2, s1, s1] at encoder.layer.0.attention.self (modeling_bert.py:0)"
        " is also used by %output (attentions[0])",
        "  hint      output_attentions=False",
    ]


@pytest.mark.parametrize("level", ["1", "2", "3", "4"])
def test_debug_output(
    level: str, tiny_bert: nn.Module, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FXBT_DEBUG", level)
    with torch.no_grad():
        fxbt.optimize(tiny_bert, {"input_ids": torch.ones(2, 3, dtype=torch.long)})
        fxbt.optimize(tiny_bert, {"input_ids": torch.ones(2, 3, dtype=torch.long), "output_attentions": True})
    lines = capfd.readouterr().err
    assert "fxbt: attention: 2 hits, 0 misses" in lines and "fxbt: attention: 0 hits, 2 misses" in lines
    assert ("-%softmax_0 = softmax(" in lines) == (level >= "2")
    assert ("the graph after qkv:" in lines) == (level >= "3")
    assert ("the attention weights are used elsewhere too" in lines) == (level >= "4")
    assert logging.getLogger("fxbt").level == logging.NOTSET and logging.getLogger("fxbt").propagate


def test_a_debug_level_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("FXBT_DEBUG", "all")
    with torch.no_grad():
        fast = fxbt.optimize(Attention().eval(), (torch.ones(2, 3, 8),))
    assert fired(fast.report) == {"attention": 1, "qkv": 1}
    assert "FXBT_DEBUG is 'all'; it takes 1 (counts), 2 (and rewrites)" in caplog.text
