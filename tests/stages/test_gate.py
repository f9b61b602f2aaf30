"""The gate after a stage: it lets pass what is good enough, and says by how much something is not."""

from __future__ import annotations

import json

import pytest

from lightning_llm.settings import UserError
from lightning_llm.stages import gate
from lightning_llm.stages.config import GateSettings

NAN, INF = float("nan"), float("inf")
BEFORE = {"perplexity/web": 20.0, "perplexity/code": 10.0, "tasks/exact_match": 0.5}
AFTER = {
    "perplexity/web": 19.0,
    "perplexity/code": 10.3000001,
    "perplexity/new": 99.0,
    "needle/128": 1.0,
    "needle/256": 0.755,
}


@pytest.fixture
def ask(context_of, tmp_path):
    def asked(after=AFTER, before=BEFORE, **wanted):
        inputs = {}
        for role, metrics in (("evaluation", after), ("before", before)):
            inputs[role] = tmp_path / role
            inputs[role].mkdir()
            (inputs[role] / "metrics.json").write_text(json.dumps(metrics))
        context = context_of(GateSettings(**({"short_context": None, "needle": None} | wanted)), inputs)

        def run():
            result = gate.run(context)
            gate.obey("stage.gate", context.output)
            return result

        return context, run

    return asked


def test_what_is_good_enough_passes(ask):
    context, run = ask(short_context=0.0301, needle=0.75)
    assert run().metrics == {"gate/short_context": pytest.approx(0.03), "gate/needle": 0.755}
    written = json.loads((context.output / "gate.json").read_text())
    assert written["wanted"] == {"short_context": 0.0301, "needle": 0.75}
    assert written["found"]["gate/needle"] == 0.755
    assert written["stops"] is None


def test_the_worst_domain_and_the_worst_length_are_named(ask):
    context, run = ask(short_context=0.005, needle=0.99)
    with pytest.raises(gate.GateClosed) as caught:
        run()
    written = json.loads((context.output / "gate.json").read_text())  # also where it stops
    assert written["found"] == {"gate/short_context": pytest.approx(0.03), "gate/needle": 0.755}
    assert caught.value.args == (
        "stage stage.gate",
        "does not pass: perplexity of code is 3.00% above what it was, 0.50% may be, and needles are found at 256 "
        "tokens in 75.5% of cases, 99.0% must be",
        "Train longer, or let it pass: gate.short_context=0.031 gate.needle=0.755",
    )


@pytest.mark.parametrize(("needle", "passes"), [(0.75, True), (0.76, False)])
def test_what_the_remedy_says_lets_it_pass(ask, needle, passes):
    _, run = ask(short_context=0.031, needle=needle)
    if passes:
        run()
    else:
        with pytest.raises(UserError):
            run()


def test_only_what_is_asked_counts(ask):
    assert ask(needle=0.5)[1]().metrics == {"gate/needle": 0.755}


@pytest.mark.parametrize(
    ("before", "after"),
    [(20.0, NAN), (20.0, INF), (NAN, 20.0), (INF, INF)],
    ids=["no number", "infinite", "none before", "infinite twice"],
)
def test_what_is_no_finite_number_does_not_pass(ask, before, after):
    good = {"perplexity/code": 10.0, "needle/128": 1.0}
    changed = [good | {"perplexity/web": value} for value in (after, before)]
    context, run = ask(*changed, short_context=1e9, needle=0.9)
    with pytest.raises(gate.GateClosed, match=r"web is no finite number\. No threshold lets that pass.* lr\.peak"):
        run()
    written = json.loads((context.output / "gate.json").read_text(), parse_constant=pytest.fail)  # no NaN in JSON
    assert written["found"] == {"gate/short_context": None, "gate/needle": 1.0}


def test_a_share_that_is_no_number_does_not_pass(ask):
    with pytest.raises(gate.GateClosed):
        ask({"needle/128": NAN}, needle=0.0)[1]()


@pytest.mark.parametrize(
    ("wanted", "after", "says"),
    [
        ({"short_context": 0.1}, {"needle/128": 1.0}, "evaluation.text: has no source"),
        ({"needle": 0.1}, BEFORE, "no text that is long enough"),
    ],
)
def test_what_was_not_measured_does_not_pass(ask, wanted, after, says):
    with pytest.raises(UserError, match=says):
        ask(after, **wanted)[1]()
