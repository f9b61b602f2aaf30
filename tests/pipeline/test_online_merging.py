"""Online merging in a recipe: its models are edges, its settings in the key, its memory in the plan."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from lightning_llm import cli, compose, plan
from lightning_llm.pipeline.key import node_keys
from lightning_llm.settings import UserError

ON = "stages.dpo.optimizer.online_merging."
GIVEN = [f"{ON}method=ondare", f"{ON}base=long_context"]


@functools.cache
def nodes_of(*words):
    return {node.name: node for node in plan(compose("qwen2", overrides=words)).nodes}


def test_its_models_are_inputs_and_the_reference_is_what_the_stage_starts_from():
    inputs = nodes_of(*GIVEN)["dpo"].inputs
    assert (inputs["merging_base"], inputs["merging_reference"]) == ("long_context", "sft")
    assert nodes_of(*GIVEN, f"{ON}reference=pretrain")["dpo"].inputs["merging_reference"] == "pretrain"
    assert "merging_base" not in nodes_of()["dpo"].inputs


def test_it_is_in_the_key_and_names_are_not():
    def key(*words):
        plain = [*words, "scale.corpora.docs.path=null"]
        return node_keys(list(nodes_of(*plain).values()), lambda source, where: "text")["dpo"]

    keys = [key(), key(*GIVEN), key(*GIVEN, f"{ON}alpha=1e-5"), key(*GIVEN, f"{ON}base=pretrain")]
    assert len(set(keys)) == 4
    assert key(*GIVEN, f"{ON}reference=sft") == key(*GIVEN)
    assert key(f"{ON}base=long_context") == key()  # it is off


def test_the_plan_has_its_memory():
    without, with_it = nodes_of()["dpo"].figures, nodes_of(*GIVEN)["dpo"].figures
    more = (with_it["memory_gib"] - without["memory_gib"]) * 2**30 / with_it["parameters"]
    assert more == pytest.approx(8)  # bytes: the task vector, and the weights during a step


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([f"{ON}method=ondare"], f"{ON}base: has no value, and ondare needs the model"),
        ([*GIVEN, f"{ON}base=sft"], f"{ON}base: is the reference itself"),
        ([*GIVEN, f"{ON}base=long_contex"], f"{ON}base: long_contex is neither .* The nearest is long_context"),
        ([*GIVEN, f"{ON}base=dpo"], f"{ON}base: goes round in a circle"),
        ([f"{ON}method=ondar"], "method: must be one of none, ondare, onties, got 'ondar'"),
        (
            [word.replace(".dpo.", ".pretrain.").replace("long_context", ".") for word in GIVEN],
            "the stage starts from random weights",
        ),
    ],
)
def test_a_mistake_is_one_line(words, says):
    with pytest.raises(UserError, match=says) as caught:
        compose("qwen2", overrides=words)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_by_the_command_line(beside, tmp_path, monkeypatch, capsys):
    """In the store of a finished run all but dpo is reused; a strong pull ends elsewhere than none."""
    monkeypatch.chdir(tmp_path)
    given = ["recipe=qwen2", *beside(tmp_path)]
    losses = {}
    for alpha in ("0", "1e-2"):
        more = [*GIVEN, f"{ON}reserve_rate=0.5", f"{ON}alpha={alpha}", f"{ON}rescale=true"]
        assert cli.command(["run", *given, *more]) == 0
        folder = Path(capsys.readouterr().out.splitlines()[-1])
        stages = json.loads((folder / "run.json").read_text())["stages"]
        made = [name for name, stage in stages.items() if not stage["reused"]]
        assert made == ["dpo", "dpo.evaluate", "online_dpo", "online_dpo.evaluate"]
        losses[alpha] = stages["dpo"]["metrics"]["validation/loss"]
        inputs = json.loads((folder / "artifacts" / "dpo" / "stage.json").read_text())["inputs"]
        assert inputs["merging_base"]["key"] == stages["long_context"]["key"]
    assert losses["0"] != losses["1e-2"]
