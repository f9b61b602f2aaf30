"""Learning from one's own responses: every arm draws as much as the others, curves are means, and pages
say what the results say."""

import json
from pathlib import Path

import pytest

from lightning_llm import compose, plan

pytestmark = pytest.mark.usefixtures("benchmarks")
METHODS = Path(__file__).resolve().parents[2] / "docs" / "methods"
PAGES = {
    "policy_gradients": "policy_optimisation.md",
    "rejection_sampling": "rejection_sampling.md",
    "online_dpo": "online_dpo.md",
    "hacking": "reward_hacking.md",
    "teacher": "distillation.md",
    "qwen2_end": "online_dpo.md",
}
RESPONSES = {"teacher": 3840, "qwen2_end": 16_128}  # of an arm, where it is not 8,192


def test_every_arm_draws_equally_many_responses_of_the_same_model():
    import policy_learning  # pyright: ignore[reportMissingImports]

    for name, part in policy_learning.PARTS.items():
        drawn, sources = set(), set()
        for called, arm in part.arms.items():
            if called == "the teacher itself":
                continue
            planned = plan(compose(arm.recipe, overrides=[*part.beginning.words, *arm.words]))
            stages = planned.recipe.stages
            learns, samples = stages[arm.stage], stages.get("sample")
            assert learns.starts_from == part.beginning.stage
            assert stages["sft"].examples == (21_000 if name == "qwen2_end" else 17_500)
            if arm.stage == "rejection":
                drawn.add(samples.prompts * samples.per_prompt)
                sources.add(tuple(samples.data.sources))
            else:
                drawn.add(responses_of(learns.rollout, steps_of(planned, arm.stage)))
                sources.add(tuple(learns.data.sources))
        assert drawn == {RESPONSES.get(name, 8192)}
        assert sources == {("prompts",)}


def steps_of(planned, stage):
    return next(node.figures["steps"] for node in planned.nodes if node.name == stage)


def responses_of(rollout, steps):
    """As many as are drawn in so many optimizer steps, of which the last record's are as many as any other's."""
    records, rest = divmod(steps, rollout.steps * rollout.epochs)
    assert not rest
    return records * rollout.steps * rollout.prompts * rollout.per_prompt


def journal(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_of_seeds_are_laid_over_one_another(tmp_path):
    import learning_curves  # pyright: ignore[reportMissingImports]

    both = []
    for shift in (0.0, 0.2):
        steps = [{"step": n, "samples": 4 * n, "reward/mean": n / 10 + shift, "kl/reference": 0.0} for n in (1, 2)]
        held_out = [{"step": n, learning_curves.HELD_OUT: n / 2} for n in (0, 2)]
        both.append(learning_curves.followed(journal(tmp_path, held_out[0], *steps, held_out[1]), 8))
    assert both[0]["reward/mean"] == {"samples": [32, 64], "value": [0.1, 0.2]}
    assert both[0][learning_curves.HELD_OUT] == {"samples": [0, 64], "value": [0.0, 1.0]}
    together = learning_curves.mean(both)["reward/mean"]
    assert together["mean"] == pytest.approx([0.2, 0.3])
    assert (together["lowest"], together["highest"]) == ([0.1, 0.2], [pytest.approx(0.3), pytest.approx(0.4)])


def test_long_curves_are_means_of_neighbours(tmp_path):
    import learning_curves  # pyright: ignore[reportMissingImports]

    steps = [{"step": n, "samples": n, "reward/mean": float(n)} for n in range(1, 101)]
    curve = learning_curves.followed(journal(tmp_path, *steps), 1)["reward/mean"]
    assert len(curve["samples"]) <= learning_curves.POINTS
    assert (curve["samples"][0], curve["value"][0]) == (4, 2.5)  # steps 1 to 4


@pytest.mark.parametrize("part", PAGES)
def test_pages_have_the_tables_of_the_results(part):
    import claims  # pyright: ignore[reportMissingImports]
    import figures  # pyright: ignore[reportMissingImports]
    import policy_learning  # pyright: ignore[reportMissingImports]

    result = json.loads((claims.RESULTS / "policy_learning.json").read_text())[part]
    assert "\n".join(policy_learning.table(part, result)) in (METHODS / PAGES[part]).read_text("utf-8")
    assert len(result["seeds"]) >= 3
    assert set(result["arms"]) == set(policy_learning.PARTS[part].arms)
    assert (figures.IMAGES / policy_learning.PARTS[part].picture).is_file()
