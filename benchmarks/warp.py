"""Do merged policies earn more reward for their KL than single ones? WARP after one and two rounds, per seed.
Writes results/warp.json and docs/images/warp.svg.

    python benchmarks/warp.py [--seeds 0 1 2] [--jobs 4] [overrides ...]

The reward is the exact answer to held-out questions, sampled at temperature 1; KL is to the SFT model, in nats per
response. A single policy is trained as many steps as two rounds, with the SFT model as its anchor all the time.
"""

from __future__ import annotations

import itertools
import statistics
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import claims
import figures
import torch
import trials
from torch import Tensor

from lightning_llm.data.token_store import TokenStore
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.evaluation.judges import Question, verify
from lightning_llm.evaluation.preference import kl_to_reference, response_logps
from lightning_llm.evaluation.tasks import respond, sample_questions
from lightning_llm.merging.averaging import linear, liti
from lightning_llm.models import Transformer

RESULT = claims.RESULTS / "warp.json"
PICTURE = figures.IMAGES / "warp.svg"
QUESTIONS, TOKENS = 500, 4096  # held out; of a pass
PROMPTS = 1000  # of a policy's training in one round: 31 steps of 32
SINGLE = [  # at nano, as the policies are there; for as many steps as one of them in two rounds
    "+stage@stages.single=rlhf", "objective@stages.single.objective=rloo", "judge@stages.single.judge=exact_answer",
    "stages.single.starts_from=sft", "stages.single.objective.beta=0.1", "stages.single.context=1024",
    "stages.single.rollout={prompts: 32, per_prompt: 4, epochs: 1, sampling: {temperature: 0.9}}",
    "stages.single.lr.peak=3e-4", f"stages.single.examples={2 * PROMPTS}", "stages.single.evaluate=false",
]  # fmt: skip
WORDS = [
    f"scale.phases.rlhf.examples={PROMPTS}", "stages.warp.rounds=2",
    *(f"stages.warp.stages.{name}.evaluate=false" for name in ("one", "two", "merged")),
]  # fmt: skip
ETAS = (0.25, 0.5, 0.75, 1.0)  # of the way from the SFT model to each of these
FRONTS = {"single policy": "single", "WARP, round 1": "warp1.merged", "WARP, round 2": "warp2.merged"}
State = Mapping[str, Tensor]


class Plane:
    """Held-out questions, and what a model's answers to them are worth and how far they are from the SFT model's."""

    def __init__(self, artifacts: Path, seed: int):
        self.artifacts, self.seed = artifacts, seed
        self.tokenizer = Tokenizer.load(artifacts / "tokenizer" / "tokenizer")
        held_out = sorted((artifacts / "evaluation.prepare" / "sources" / "tasks").glob("*/validation"))
        self.questions: list[Question] = sample_questions(
            {path.parent.name: TokenStore.open(path) for path in held_out}, QUESTIONS
        )
        assert len(self.questions) == QUESTIONS, "the run has prepared fewer"
        self.reference = self.model("sft")

    def model(self, name: str) -> Transformer:
        return Transformer.from_pretrained(self.artifacts / name / "model").eval()

    def state(self, name: str) -> State:
        return self.model(name).state_dict()

    def point(self, state: State) -> dict[str, float]:
        """Reward and KL of a model's own samples."""
        model = self.model("sft")
        model.load_state_dict(state)
        with torch.inference_mode():
            drawn = respond(
                model, self.questions, decode=self.tokenizer.decode, stop_ids=self.tokenizer.stop_ids,
                max_new_tokens=48, max_tokens=TOKENS, temperature=1.0, seed=self.seed,
            )  # fmt: skip
            prompts, ids = [question.prompt_ids for question in self.questions], [[each.ids] for each in drawn]
            policy, reference = (response_logps(each, prompts, ids, TOKENS)[:, 0] for each in (model, self.reference))
        right = [verify(question, response) for question, response in zip(self.questions, drawn, strict=True)]
        return {"reward": statistics.fmean(right), "kl": kl_to_reference(policy, reference)}


def measure(arguments: Namespace) -> trials.Result:
    """The result."""
    calls = [(seed, arguments.overrides) for seed in arguments.seeds]
    found = trials.side_by_side(points_of, calls, arguments.jobs)
    points = {
        name: {figure: trials.spread([seed["points"][name][figure] for seed in found]) for figure in ("reward", "kl")}
        for name in found[0]["points"]
    }
    angle, fronts = trials.spread([seed["angle"] for seed in found]), [seed["fronts"] for seed in found]
    return {"claims": judge(found), "points": points, "angle": angle, "fronts": fronts}


def points_of(seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """All points of one seed."""
    words = [*WORDS, *overrides]
    folder = trials.run("recipe=warp", f"seed={seed}", "until=warp2.merged", *words)
    single = trials.run("recipe=warp", f"seed={seed}", "until=single", *SINGLE, *words)
    plane = Plane(folder / "artifacts", seed)
    start = plane.state("sft")
    states = {name: plane.state(name) for name in ("warp1.one", "warp1.two", "warp1.merged", "warp2.merged")}
    states["single"] = Transformer.from_pretrained(single / "artifacts" / "single" / "model").state_dict()
    points = {"sft": plane.point(start)} | {name: plane.point(state) for name, state in states.items()}
    points["warp1.lerp"] = plane.point(linear([states["warp1.one"], states["warp1.two"]]))
    fronts = {
        title: [points["sft"], *(plane.point(liti(start, states[name], eta)) for eta in ETAS)]
        for title, name in FRONTS.items()
    }
    merged = trials.read(folder / "artifacts" / "warp1.merged" / "stage.json")["metrics"]
    return {"points": points, "fronts": fronts, "angle": merged["task_vectors/angle"]}


def reward_at(front: Sequence[Mapping[str, float]], kl: float) -> float:
    """Reward of a front at a KL, linear between its points; at its ends as there."""
    ordered = sorted(front, key=lambda point: point["kl"])
    for one, two in itertools.pairwise(ordered):
        if one["kl"] <= kl <= two["kl"] and two["kl"] > one["kl"]:
            share = (kl - one["kl"]) / (two["kl"] - one["kl"])
            return one["reward"] + share * (two["reward"] - one["reward"])
    return ordered[0]["reward"] if kl < ordered[0]["kl"] else ordered[-1]["reward"]


def advantages(found: Sequence[Mapping[str, Any]], one: str, other: str) -> list[float]:
    """For each seed by how much the reward of front `one` lies above that of `other`, at the largest KL of both."""
    gains = []
    for seed in found:
        kl = min(max(point["kl"] for point in seed["fronts"][name]) for name in (one, other))
        gains.append(reward_at(seed["fronts"][one], kl) - reward_at(seed["fronts"][other], kl))
    return gains


def judge(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the paper says, in the mean over the seeds."""
    rewards = {name: [seed["points"][name]["reward"] for seed in found] for name in found[0]["points"]}
    parents = [max(one, two) for one, two in zip(rewards["warp1.one"], rewards["warp1.two"], strict=True)]
    single, first, second = FRONTS
    values = {
        "SLERP of two policies earns more than the better one of them (reward)": trials.differences(
            rewards["warp1.merged"], parents
        ),
        "SLERP earns more than LERP (reward)": trials.differences(rewards["warp1.merged"], rewards["warp1.lerp"]),
        "Merged policies earn more than a single one at the same KL (reward)": advantages(found, first, single),
        "A second round earns more than the first at the same KL (reward)": advantages(found, second, first),
    }
    return [claims.clearly(says, each, above=0.0) for says, each in values.items()]


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of the table of points: reward and KL of each seed."""
    rows = [
        [name, figures.by_seed(found["reward"], ".3f", ", "), figures.by_seed(found["kl"], ".2f", ", ")]
        for name, found in result["points"].items()
    ]
    return figures.lines_of_table(["model", "reward, by seed", "KL to the SFT model, nats"], rows)


def draw(result: Mapping[str, Any]) -> None:
    """The fronts of every seed, and the policies as crosses."""
    count = len(result["fronts"])
    with figures.drawing(PICTURE, columns=count, size=(3.8 * count, 3.4)) as panels:
        for place, (axes, fronts) in enumerate(zip(panels, result["fronts"], strict=True)):
            for title, front in fronts.items():
                axes.plot([p["kl"] for p in front], [p["reward"] for p in front], marker="o", markersize=4, label=title)
            for name in ("warp1.one", "warp1.two", "warp1.lerp"):
                kl, reward = (result["points"][name][figure]["values"][place] for figure in ("kl", "reward"))
                axes.plot(kl, reward, "x", color="black")
                axes.annotate(name.partition(".")[2], (kl, reward), fontsize=7)
            axes.set(xlabel="KL to the SFT model, nats", ylabel="reward")
        panels[0].legend(fontsize=7)


if __name__ == "__main__":
    trials.publish(__doc__, RESULT, measure, table, draw)
