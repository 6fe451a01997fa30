"""Pictures of graphs show every node and every edge."""

import re

import pytest

import ggpy
from ggpy.graph import pictures
from tests.models.checkpoints import converted
from tests.models.test_moe import made


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """The graphs of a model with experts and latent attention, and of a dense one with biases."""
    graphs = []
    for name in ("V2-Lite", "qwen2"):
        with ggpy.load(converted(tmp_path_factory.mktemp("model"), made(name)), n_ctx=32) as model:
            graphs.append(model.graph())
    return graphs


def computed(nodes):
    return [t for t in nodes if t.op not in ("WEIGHT", "CACHE")]


def edges(nodes):
    kept = {t.name for t in computed(nodes)}
    return sorted((i.name, t.name) for t in computed(nodes) for i in t.inputs if i.name in kept)


def test_text_has_a_line_for_each_computed_node_with_its_shape(graphs):
    for graph in graphs:
        lines = pictures.text(graph).splitlines()[1:]
        assert [line.split()[:3] for line in lines] == [
            [t.name, t.op, "×".join(map(str, t.shape))] for t in computed(graph)
        ]


@pytest.mark.parametrize(
    "draw, node, edge",
    [
        (pictures.mermaid, r'^  (\w+)\["([^<]+)<br>', r"^  (\w+) --> (\w+)$"),
        (pictures.dot, r'^  (\w+) \[label="([^\\]+)\\n', r"^  (\w+) -> (\w+);$"),
    ],
)
def test_charts_have_all_computed_nodes_and_edges(graphs, draw, node, edge):
    for graph in graphs:
        chart = draw(graph)
        names = dict(re.findall(node, chart, re.M))
        assert sorted(names.values()) == sorted(t.name for t in computed(graph))
        assert sorted((names[a], names[b]) for a, b in re.findall(edge, chart, re.M)) == edges(graph)


def test_a_layer_is_the_nodes_of_its_number_alone(graphs):
    names = {t.name for t in pictures.of_layer(graphs[0], 1)}
    assert "blk.1.attn" in names and all(name.startswith("blk.1.") for name in names)
    assert pictures.of_layer(graphs[0], 99) == []


def test_bytes_are_those_that_one_token_reads(graphs):
    graph = graphs[0]
    # 3 of 8 experts, 32 × 64 float32 values each; one of 512 embeddings
    assert pictures.weight_bytes(graph["blk.1.ffn_gate_exps"]) == 3 * 32 * 64 * 4
    assert pictures.weight_bytes(graph["embd"]) == 64 * 4
    assert pictures.weight_bytes(graph["blk.0.ffn_gate"]) == 96 * 64 * 4
    assert pictures.weight_bytes(graph["blk.0.q_heads"]) == 0


@pytest.mark.parametrize(
    "n, text", [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_000_000, "2 MB"), (12_340_000_000, "12.3 GB")]
)
def test_bytes_for_people(n, text):
    assert pictures.bytes_text(n) == text


def test_layers_side_by_side_keep_the_order_of_both(graphs):
    first, second = pictures.of_layer(graphs[0], 1), pictures.of_layer(graphs[1], 1)
    rows = pictures.side_by_side(first, second)
    for column, nodes in ((1, first), (2, second)):
        expected = [t.name.removeprefix("blk.1.") for t in computed(nodes)]
        assert sorted(row[0] for row in rows if row[column]) == sorted(expected)
    names = [row[0] for row in rows]
    assert [n for n in names if rows[names.index(n)][1]] == [t.name.removeprefix("blk.1.") for t in computed(first)]
    of_second = [t.name.removeprefix("blk.1.") for t in computed(second) if t.name not in {x.name for x in first}]
    assert [n for n in names if n in of_second] == of_second
    assert names.index("ffn_norm") < names.index("ffn_gate") < names.index("out")
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["attn"] == ("ATTENTION_LATENT 1×4×32", "ATTENTION 1×4×16")
    assert by_name["route"] == ("ROUTE 1×3×2", "")
    assert by_name["ffn_gate_exps"][0] == "MUL_MAT_ID 1×3×32 [F32 8×32×64, 24.6 kB]"


def test_a_layer_beside_itself_differs_nowhere(graphs):
    layer = pictures.of_layer(graphs[0], 2)
    rows = pictures.side_by_side(layer, layer)
    assert len(rows) == len(computed(layer)) and all(a == b != "" for _, a, b in rows)
