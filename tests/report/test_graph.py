"""The drawn graph: Qwen 2's stages where one expects them, and what must hold for any graph of stages."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.report.graph import draw_graph, lay_out, visible_edges
from lightning_llm.report.record import Node, Run


def stage(name, kind="train", **inputs):
    return Node(name, kind, inputs, planned={"name": name, "kind": kind, "tokens": 1000})


def trained(name, before=None, *, reference=False):
    """A training stage with the nodes that are made for it."""
    nodes = [stage(f"{name}.prepare", "prepare", tokenizer="tokenizer")]
    inputs = {"data": f"{name}.prepare", "tokenizer": "tokenizer"} | ({"starts_from": before} if before else {})
    if reference:
        nodes.append(stage(f"{name}.reference", "score", model=before, data=f"{name}.prepare"))
        inputs["reference"] = f"{name}.reference"
    evaluate = {"model": name, "data": "evaluation.prepare", "tokenizer": "tokenizer"}
    evaluate |= {"starts_from": before} if before else {}
    return [*nodes, stage(name, **inputs), stage(f"{name}.evaluate", "evaluate", **evaluate)]


SHARED = [stage("tokenizer", "prepare"), stage("evaluation.prepare", "prepare", tokenizer="tokenizer")]
QWEN2 = [
    *SHARED,
    *trained("pretrain"),
    *trained("long_context", "pretrain"),
    *trained("sft", "long_context"),
    *trained("dpo", "sft", reference=True),
]


def test_qwen2_is_a_line_of_models_with_data_above_and_tests_below():
    places = lay_out(QWEN2)
    assert [places[name] for name in ("pretrain", "long_context", "sft", "dpo")] == [(1, 0), (2, 0), (3, 0), (4, 0)]
    assert [places[f"{name}.prepare"] for name in ("pretrain", "long_context", "sft")] == [(1, -1), (2, -1), (3, -1)]
    assert (places["dpo.prepare"], places["dpo.reference"]) == ((4, -2), (4, -1))
    assert [places[f"{name}.evaluate"][1] for name in ("pretrain", "long_context", "sft", "dpo")] == [1, 1, 1, 1]
    assert (places["tokenizer"], places["evaluation.prepare"]) == ((0, -1), (0, 1))


def test_edges_that_follow_from_others_are_left_out_but_never_where_a_model_starts_from():
    edges = visible_edges(QWEN2)
    assert ("tokenizer", "sft.prepare") in edges
    assert ("tokenizer", "sft") not in edges  # follows from tokenizer -> sft.prepare -> sft
    assert ("dpo.prepare", "dpo") not in edges  # follows from dpo.prepare -> dpo.reference -> dpo
    assert ("sft", "dpo") in edges  # although it follows from sft -> dpo.reference -> dpo


@st.composite
def recipes(draw):
    """Any recipe: each stage starts from one before it or from none."""
    nodes = list(SHARED)
    names = [f"stage{number}" for number in range(draw(st.integers(1, 6)))]
    for number, name in enumerate(names):
        before = draw(st.sampled_from([None, *names[:number]]))
        nodes += trained(name, before, reference=before is not None and draw(st.booleans()))
    return nodes


@given(recipes())
def test_any_recipe_has_every_node_in_a_place_of_its_own_and_models_flow_onwards(nodes):
    places = lay_out(nodes)
    assert set(places) == {node.name for node in nodes}
    assert len(set(places.values())) == len(nodes)
    for node in nodes:
        if "starts_from" in node.inputs and node.kind == "train":
            assert places[node.inputs["starts_from"]][0] < places[node.name][0]


@given(recipes())
def test_edges_left_out_can_still_be_walked(nodes):
    """What can be reached along all edges can be reached along the drawn ones."""
    drawn = visible_edges(nodes)

    def reached(edges):
        closure = {node.name: set() for node in nodes}
        for node in nodes:  # inputs come first
            for source, target in edges:
                if target == node.name:
                    closure[target] |= {source} | closure[source]
        return closure

    assert reached(drawn) == reached([(source, node.name) for node in nodes for source in node.inputs.values()])


@pytest.mark.parametrize("nodes", [QWEN2, SHARED, [stage("alone")]], ids=["qwen2", "no model", "one stage"])
def test_a_drawing_has_a_box_for_each_node_inside_the_paper(nodes, tmp_path):
    svgs = re.findall(r"<svg.*?</svg>", draw_graph(Run(tmp_path, {}, {}, {}, nodes, [])), re.DOTALL)
    assert len(svgs) == 2  # for wide and for narrow screens
    for svg in svgs:
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
        boxes = re.findall(r'<rect x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)" rx="7"/>', svg)
        assert len(boxes) == len(nodes)
        for x, y, w, h in (map(float, box) for box in boxes):
            assert 0 <= x <= width - w
            assert 0 <= y <= height - h
        assert all(f'href="#stage-{node.name}"' in svg for node in nodes)


COMMITTEE = [
    *SHARED,
    *trained("sft"),
    *trained("dpo", "sft"),
    stage("post1.sample.prepare", "prepare", tokenizer="tokenizer"),
    stage("post1.sample", "generate", **{"model.0": "sft", "model.1": "dpo", "data": "post1.sample.prepare"}),
    stage("post1.best", "select", **{"samples.0.0": "post1.sample"}),
    stage("post1.rs.prepare", "prepare", **{"tokenizer": "tokenizer", "source.best": "post1.best"}),
    stage("post1.rs", data="post1.rs.prepare", starts_from="sft"),
]


def test_a_committee_and_what_is_selected_have_their_lines():
    edges = visible_edges(COMMITTEE)
    assert ("sft", "post1.sample") in edges  # although it follows from sft -> dpo -> post1.sample
    assert ("dpo", "post1.sample") in edges
    assert ("post1.sample", "post1.best") in edges
    assert ("post1.best", "post1.rs.prepare") in edges
    places = lay_out(COMMITTEE)
    columns = [places[name][0] for name in ("dpo", "post1.sample", "post1.best", "post1.rs")]
    assert columns == sorted(set(columns))  # from left to right


def test_stages_of_a_round_are_called_by_their_whole_name(tmp_path):
    drawn = draw_graph(Run(tmp_path, {}, {}, {}, COMMITTEE, []))
    labels = re.findall(r'<text x="[\d.]+" y="[\d.]+">([^<]*)</text>', drawn)
    assert labels.count("post1.sample") == 2  # for wide and for narrow screens
    assert "rs" not in labels
    assert 'class="node kind-select' in drawn
