"""The report says what was done, why not, and for how long, from the records that the pipeline leaves."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, fx, nn

import fxbt
from fxbt.report import Report
from fxbt.rule import Miss, StageRecord


def miss(rule: str, where: str, reason: str, expected: str = "", found: str = "") -> Miss:
    made = Miss(reason, expected=expected, found=found)
    made.rule, made.where = rule, where
    return made


def captured() -> SimpleNamespace:
    return SimpleNamespace(seconds=1.25)


def compiled(**changes: object) -> SimpleNamespace:
    misses = [
        miss("attention", f"encoder.layer.{i}", "the weights are returned", "one user", "%output") for i in range(5)
    ]
    stages = [
        StageRecord("canonical", seconds=0.01, nodes_before=40, nodes_after=30),
        StageRecord("attention", hits=1, misses=misses, seconds=0.02, nodes_before=30, nodes_after=25),
        StageRecord("qkv", seconds=0.001, nodes_before=25, nodes_after=25),
    ]
    made = SimpleNamespace(
        module=fx.symbolic_trace(nn.ReLU()),
        before="%input = input -> f32[s0]\n%relu_0 = relu(%input) -> f32[s0]\nreturn (%relu_0)",
        after="%input = input -> f32[s0]\n%abs_0 = abs(%input) -> f32[s0]\nreturn (%abs_0)",
        hits={"attention": 1},
        misses=misses,
        refusals=[],
        stages=stages,
        seconds=0.5,
        derived_bytes=3 * 2**20,
    )
    vars(made).update(changes)
    return made


def filled(**changes: object) -> Report:
    report = Report()
    report.add_graph("x: f32[2, 3]", captured(), compiled(**changes))
    return report


@pytest.mark.parametrize("ask", ["before", "after", "diff", "why", "str"])
def test_nothing_captured_yet_says_what_to_do(ask: str) -> None:
    report = Report()
    texts = {"before": report.before, "after": report.after, "diff": report.diff(), "str": str(report)}
    text = texts.get(ask) or report.why("attention")
    assert "nothing is captured yet: call the model, or fast.warmup(...)" in text
    assert report.hits == {}


def test_it_speaks_of_the_latest_graph() -> None:
    report = filled()
    report.add_graph("x: f32[2, 3, 4]", captured(), compiled(hits={"attention": 7}, before="other"))
    assert report.hits == {"attention": 7}
    assert report.before == "other"
    assert list(report.graphs) == ["x: f32[2, 3]", "x: f32[2, 3, 4]"]


def test_two_graphs_of_one_signature_are_both_kept() -> None:
    report = filled()
    report.add_graph("x: f32[2, 3]", captured(), compiled(hits={}))
    assert list(report.graphs) == ["x: f32[2, 3]", "x: f32[2, 3] (2)"]
    assert report.hits == {}


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
    assert "4 more at encoder.layer.1, encoder.layer.2, encoder.layer.3, …" in text


def test_only_the_first_kinds_of_misses_are_printed() -> None:
    misses = [miss("attention", "layer", f"reason {i}") for i in range(12)]
    text = str(filled(misses=misses))
    assert "reason 7" in text
    assert "reason 8" not in text
    assert "4 more kinds: report.why(rule) has them all" in text


def test_refusals_and_fallbacks_are_named_once_each() -> None:
    report = filled(refusals=["attention at layer 0: differs by 0.3"])
    for _ in range(3):
        report.add_fallback("argument past_key_values holds a DynamicCache")
    assert report.fallbacks == ["argument past_key_values holds a DynamicCache"]
    assert "attention at layer 0: differs by 0.3" in str(report)
    assert "the original forward ran because\n- argument past_key_values holds a DynamicCache" in str(report)


def test_why_shows_the_near_miss_with_expected_and_found() -> None:
    text = filled().why("attention", at="encoder.layer.3")
    assert text.splitlines() == [
        "attention at encoder.layer.3: the weights are returned",
        "  expected  one user",
        "  found     %output",
    ]


def test_why_takes_whole_module_names() -> None:
    misses = [miss("attention", "encoder.layer.10", "ten")]
    assert "no near miss at encoder.layer.1;" in filled(misses=misses).why("attention", at="encoder.layer.1")


def test_why_of_a_rule_that_fired_or_never_ran() -> None:
    assert filled(misses=[]).why("attention") == "attention has no near miss; it fired 1 times in this graph"
    answer = filled().why("rotary")
    assert answer == "no rule 'rotary' ran on this graph; the rules that ran: canonical, attention, qkv"


def test_diff_is_between_before_and_after() -> None:
    diff = filled().diff()
    assert "-%relu_0' = relu(%input) -> f32[s0]" in diff
    assert "+%abs_0 = abs(%input) -> f32[s0]" in diff


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
    assert report.hits == {"attention": 1, "qkv": 1}
    assert "-%softmax_0' = softmax(" in report.diff()
    assert "[qkv]" in report.after
    assert report.why("attention") == "attention has no near miss; it fired 1 times in this graph"
    (graph,) = report.graphs.values()
    assert isinstance(graph.module, fx.GraphModule)
