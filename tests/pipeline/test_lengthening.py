"""Context in steps: what differs from step to step, what a gate stops, and what a scale asks of its models."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from lightning_llm import cli, compose, plan
from lightning_llm.evaluation.config import NeedleConfig
from lightning_llm.pipeline.key import node_keys
from lightning_llm.settings import UserError
from lightning_llm.stages.config import GateConfig, GateSettings

STEP = "stages.lengthen.by_round.step"
GATED = ["stages.long_context.gate.needle=0", "stages.long_context.gate.short_context=1e9"]  # anything passes


@functools.cache
def nodes_of(recipe, *words, scale="nano"):
    return {node.name: node for node in plan(compose(recipe, scale, words)).nodes}


def test_six_steps_as_the_report_has_them():
    nodes = nodes_of("lengthening", "compute=ddp", scale="paper")
    steps = [nodes[f"lengthen{n}.step"] for n in range(1, 7)]
    assert [step.settings.context[0]["value"] for step in steps] == [16_384, 32_768, 49_152, 65_536, 98_304, 131_072]
    assert [step.inputs["starts_from"] for step in steps] == ["pretrain", *(f"lengthen{n}.step" for n in range(1, 6))]
    assert sum(step.settings.tokens for step in steps) == pytest.approx(8e11, rel=0.01)
    assert nodes["anneal"].settings.context[0]["value"] == 131_072
    for n in range(1, 7):  # with the model before the first step, so that what steps lose does not add up
        node = nodes[f"lengthen{n}.step.gate"]
        assert node.inputs == {"evaluation": f"lengthen{n}.step.evaluate", "before": "pretrain.evaluate"}
        assert node.settings == GateSettings(0.005, 0.99)
    order = list(nodes)
    assert order.index("lengthen1.step.evaluate") < order.index("lengthen1.step.gate") < order.index("lengthen2.step")


def test_a_scale_keeps_the_multiples_and_asks_what_its_models_can():
    nodes = nodes_of("lengthening")
    contexts = [nodes[f"lengthen{n}.step"].settings.context[0]["value"] for n in range(1, 7)]
    assert contexts == [256, 512, 768, 1024, 1536, 2048]
    assert nodes["lengthen6.step.evaluate"].settings.evaluation.needle.trials > 0
    assert nodes["pretrain.evaluate"].settings.evaluation.needle == NeedleConfig()
    own = ["scale.phases.lengthen.gate={short_context: 0.25, needle: 0.125}"]
    assert nodes_of("lengthening", *own)["lengthen2.step.gate"].settings == GateSettings(0.25, 0.125)
    own.append("stages.lengthen.stages.step.gate.needle=0.75")
    assert nodes_of("lengthening", *own)["lengthen2.step.gate"].settings == GateSettings(0.25, 0.75)
    own.append("stages.lengthen.stages.step.gate.short_context=null")
    node = nodes_of("lengthening", *own)["lengthen2.step.gate"]
    assert node.settings == GateSettings(None, 0.75)
    assert node.inputs == {"evaluation": "lengthen2.step.evaluate"}


def test_a_gate_compares_with_the_model_before_the_first_gated_stage_in_a_row():
    def before(*words):
        gates = [f"stages.{name}.gate.short_context=1" for name in ("long_context", "sft")]
        nodes = nodes_of("qwen2", *gates, *words)
        return [nodes[f"{name}.gate"].inputs["before"] for name in ("long_context", "sft")]

    merge = ["+stage@stages.mean=merge", "stages.mean.models=[long_context,pretrain]", "stages.sft.starts_from=mean"]
    assert before() == before(*merge) == ["pretrain.evaluate", "pretrain.evaluate"]
    only_sft = nodes_of("qwen2", "stages.sft.gate.short_context=1", *merge)["sft.gate"]
    assert only_sft.inputs["before"] == "mean.evaluate"


def test_pre_training_ends_at_a_hundredth_of_its_peak():
    for model in ("llama3_1_8b", "llama3_1_405b"):
        nodes = nodes_of("lengthening", "compute=ddp", f"model={model}", scale="paper")
        lr = nodes["pretrain"].settings.lr
        assert lr.final == pytest.approx(lr.peak / 100)  # of the 405B 8e-5 to 8e-7
        assert nodes["anneal"].settings.lr.peak == nodes["lengthen6.step"].settings.lr.final
    assert (lr.peak, lr.final) == (8e-5, pytest.approx(8e-7))
    nodes = nodes_of("lengthening", "stages.pretrain.lr.peak=0.5")
    assert nodes["pretrain"].settings.lr.final == 0.005


def test_the_users_own_steps():
    words = ["stages.lengthen.rounds=2", f"{STEP}.context=[200,300]", f"+{STEP}.rope_theta=[1e6,2e6]"]
    nodes = nodes_of("lengthening", *words, f"+{STEP}.lr.peak=[0.5,0.25]", f"+{STEP}.tokens=[1e5,2e5]")
    steps = [nodes[f"lengthen{n}.step"].settings for n in (1, 2)]
    assert [step.context[0]["value"] for step in steps] == [200, 300]  # not scaled: the user's word is final
    assert [step.rope_theta for step in steps] == [1e6, 2e6]
    assert [step.lr.peak for step in steps] == [0.5, 0.25]
    assert [step.tokens for step in steps] == [100_000, 200_000]
    assert "lengthen3.step" not in nodes
    assert nodes["anneal"].settings.context[0]["value"] == 300


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stages.lengthen.rounds=7"], rf"{STEP}\.context: has 6 values, and there are more rounds"),
        ([f"+{STEP}.contxt=[1,2,3,4,5,6]"], rf"{STEP}\.contxt: is not a setting of this stage\. .*context"),
        ([f"{STEP}.context=512"], rf"{STEP}\.context: is 512\. Give a list"),
        ([f"+{STEP}.lr=[1,2]"], "by_round"),
        (["+stages.lengthen.by_round.steep.context=[1]"], r"by_round\.steep: there is no stage steep.* step"),
        (["stages.lengthen.stages.step.context=512"], rf"is another one in each round\. Give {STEP}\.context="),
        (["stages.lengthen.stages.step.gate.needle=2"], "needle: is a share"),
        (["stages.lengthen.stages.step.evaluate=false"], r"step\.gate: is given, .*evaluate=true"),
        (
            ["stages.pretrain.evaluate=false"],
            r"gate\.short_context: is given, and nothing is known of the model before",
        ),
        (["stages.anneal.starts_from=lengthen.stp"], r"^stages\.anneal\.starts_from: lengthen\.stp is neither a stage"),
        (["stages.lengthen.stages.step.starts_from=step"], "goes round in a circle"),
        (["stages.pretrain.gate.short_context=0.1"], r"before it \(random weights\)"),
        (["evaluation.needle.answer=gredy"], "answer: is greedy or likelihood"),
        (["+scale.evaluation.needle.trails=3"], r"needle\.trails.*trials"),
    ],
)
def test_a_mistake_is_one_line(words, says):
    with pytest.raises(UserError, match=says) as caught:
        compose("lengthening", overrides=words)
    assert "\n" not in str(caught.value)


def test_a_gate_is_in_no_key_but_its_own_and_its_evaluation_s():
    def keys(*words):
        nodes = nodes_of("qwen2", *words)
        return node_keys(list(nodes.values()), lambda source, where: "text")

    plain, gated = keys(), keys(*GATED)
    assert {name for name in gated if gated[name] != plain.get(name)} == {"long_context.evaluate", "long_context.gate"}
    assert keys("stages.long_context.gate.short_context=0.1").items() >= plain.items()


def test_needles_of_a_scale_change_no_evaluation_that_hides_none():
    plain, other = nodes_of("qwen2"), nodes_of("qwen2", "scale.evaluation.needle.answer=greedy")
    assert all(plain[name].settings == node.settings for name, node in other.items())
    asked = nodes_of("qwen2", "evaluation.needle.trials=2")
    assert asked["sft.evaluate"].settings.evaluation.needle == NeedleConfig(trials=2, answer="likelihood")
    more = asked["sft.evaluate"].figures["tokens"] - plain["sft.evaluate"].figures["tokens"]
    assert more == 2 * 10 * (128 + 256 + 512 + 1024)


def test_a_gate_without_a_setting_is_off():
    assert not GateConfig().is_on
    assert not [node for node in nodes_of("qwen2") if node.endswith(".gate")]


@pytest.mark.slow
def test_a_run_stops_at_a_gate_and_goes_on_when_it_is_told_to(beside, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [*beside(tmp_path), "until=sft", "evaluation.needle.trials=1", "evaluation.needle.depths=3"]

    def run(*words):
        code = cli.command(["run", "recipe=qwen2", *given, *words])
        return code, *capsys.readouterr()

    stopping = "stages.long_context.gate={needle: 1, short_context: -0.9}"
    code, output, errors = run(stopping)
    assert code == 2
    said = next(line for line in errors.splitlines() if "does not pass" in line)
    assert "stage long_context" in said
    assert "stages.long_context.gate.needle=" in said
    stopped = Path(output.splitlines()[-1])  # its figures are on record
    facts = json.loads((stopped / "run.json").read_text())
    assert (facts["status"], list(facts["stages"])[-1]) == ("stopped", "long_context.gate")
    found = facts["stages"]["long_context.gate"]["metrics"]
    kept = json.loads((stopped / "artifacts" / "long_context.gate" / "gate.json").read_text())
    assert kept["wanted"] == {"short_context": -0.9, "needle": 1.0}
    assert kept["found"] == found
    page, tables = ((stopped / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "a gate has stopped the run" in page
    assert "Needles in a haystack" in page
    assert "it is likelier than all wrong ones (by chance 0.1)" in page
    for shown in (page, tables):
        assert "rise of perplexity on short texts" in shown
        assert "at least 100.0 %" in shown
        assert f"{100 * found['gate/needle']:.1f} %" in shown
    assert run(stopping)[0] == 2  # again, from what is there
    code, output, _ = run(*GATED)
    assert code == 0
    folder = Path(output.splitlines()[-1])
    stages = json.loads((folder / "run.json").read_text())["stages"]
    assert stages["long_context"]["reused"]
    assert stages["sft"]["reused"]
    assert stages["long_context.gate"]["metrics"]["gate/needle"] <= 1
    assert {"needle/128", "needle/1024"} <= stages["long_context"]["metrics"].keys()
    assert cli.command(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "Needles in a haystack" in page
    assert '"type":"heatmap"' in page
    tables = (folder / "report.md").read_text().partition("## Needles found: long_context")[2]
    assert "| depth | 128 tokens |" in tables.replace("1,024", "1024")
