"""The graph as it runs, as a networkx graph."""

from typing import Any

import networkx
import pytest
import torch
from torch import nn

import fxbt


@pytest.fixture(scope="module")
def graph() -> networkx.DiGraph:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        fast: Any = fxbt.optimize(model, (torch.randn(2, 5, 16),))
    return fast.report.latest.networkx()


def test_a_graph_has_an_order_from_its_inputs_to_its_output(graph: networkx.DiGraph) -> None:
    assert networkx.is_directed_acyclic_graph(graph)
    (output,) = (name for name, node in graph.nodes(data=True) if node["op"] == "output")
    (x,) = (name for name, node in graph.nodes(data=True) if node["op"] == "placeholder")
    assert networkx.has_path(graph, x, output)
    assert x in networkx.ancestors(graph, output)


def test_its_nodes_say_what_they_are_and_who_made_them(graph: networkx.DiGraph) -> None:
    layers = [node for _, node in graph.nodes(data=True) if node["rule"] == "encoder_layer"]
    assert [node["module"] for node in layers] == ["layers.0", "layers.1"]
    assert all(node["op"] == "encoder_layer" and node["dtype"] is torch.float32 for node in layers)
    assert all(len(node["shape"]) == 3 and node["shape"][2] == 16 for node in layers)
    weights = [node for _, node in graph.nodes(data=True) if node["op"] == "get_attr"]
    assert weights and all(node["rule"] == "" for node in weights)


def test_its_edges_say_which_arguments_they_are(graph: networkx.DiGraph) -> None:
    (x,) = (name for name, node in graph.nodes(data=True) if node["op"] == "placeholder")
    first = next(name for name, node in graph.nodes(data=True) if node["op"] == "encoder_layer")
    assert 1 in graph.edges[x, first]["arguments"]  # 0 is the layer's own graph
    assert all(graph.edges[edge]["arguments"] for edge in graph.edges)
