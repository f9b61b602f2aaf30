"""Do models learn from their own judged responses while they train? From SFT models stopped half-way, per seed: policy
gradients and rejection sampling at equal samples, online DPO, a reward that can be hacked, and a teacher in a judge's
place; and from offline DPO's model, as recipe=qwen2 ends. Writes results/policy_learning.json and a picture for each
part.

    python benchmarks/policy_learning.py [--seeds 0 1 2] [--jobs 4] [overrides ...]
        [--parts policy_gradients rejection_sampling online_dpo hacking teacher qwen2_end]

All arms of a seed share the model that they start from, which the store holds, and draw equally many responses.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import claims
import figures
import learning_curves
import trials
from figures import shown
from half_way import ASKED, DRAWN, EXACT, HALF_WAY, KL, MODELLED, HeldOut
from trials import changes, read, spreads

RESULT = claims.RESULTS / "policy_learning.json"
REWARD_MODEL = "reward_model"  # the stage, and the judge that asks it


@dataclass(frozen=True)
class Arm:
    """A way to learn: a stage of a recipe, and what is said of it on the command line."""

    recipe: str
    stage: str
    words: Sequence[str] = ()
    most: float | None = 1.0  # reward of a response: curves show the share of it that is earned; none: no curves
    until: str | None = None  # what the recipe is run to; none: that stage; "": its end


@dataclass(frozen=True)
class Beginning:
    """A model that arms start from."""

    called: str
    stage: str
    words: Sequence[str]  # typed of every arm


HALF_WAY_SFT = Beginning("SFT, half-way", "sft", HALF_WAY)
OFFLINE_DPO = Beginning("offline DPO", "dpo", ASKED)


@dataclass(frozen=True)
class Part:
    """Arms that stand in one table, and what the table shows of them."""

    arms: Mapping[str, Arm]
    columns: Mapping[str, str]  # figure -> head of a column
    curves: Mapping[str, str]  # figure of metrics.jsonl -> label of an axis; none: changes are drawn
    picture: str
    judged: Any = field(repr=False)  # arms' changes -> claims
    beginning: Beginning = HALF_WAY_SFT


def policy_gradient(objective: str, *words: str, judge: str = "exact_answer", most: float = 1.0) -> Arm:
    """The stage `rlhf` with another objective and judge."""
    chosen = (
        f"objective@stages.rlhf.objective={objective}",
        f"judge@stages.rlhf.judge={judge}",
        f"stages.rlhf.examples={PROMPTS}",
    )
    return Arm("policy_gradients", "rlhf", (*chosen, *words), most)


def online_dpo(judge: str, *words: str, most: float | None = 1.0) -> Arm:
    """Online DPO right after SFT, without online merging."""
    chosen = ("+stage@stages.online=online_dpo", "stages.online.starts_from=sft", f"judge@stages.online.judge={judge}")
    drawn = (f"stages.online.examples={ONLINE_PROMPTS}", f"stages.online.rollout.per_prompt={ONLINE_PER_PROMPT}")
    figures = ("stages.online.context=1024", "stages.online.lr.peak=5e-5")
    return Arm("qwen2", "online", (*chosen, *drawn, *figures, *words), most)


def ending(*words: str) -> Arm:
    """The last stage of Qwen 2, and what is said otherwise of it."""
    return Arm("qwen2", "online_dpo", words, most=None, until="")  # with the reward model, also where nobody asks it


def of_teacher(*words: str) -> Arm:
    """The student's own answers, each token corrected by the teacher."""
    chosen = ("+stage@stages.gkd=on_policy_distil", "stages.gkd.starts_from=sft", f"stages.gkd.learns_from={TEACHER}")
    figures = (f"stages.gkd.examples={TAUGHT}", "stages.gkd.context=1024", "stages.gkd.lr.peak=4e-4")
    steps = ("stages.gkd.rollout.prompts=32",)
    return Arm("qwen2", "gkd", (*TAUGHT_FOR_LONGER, *chosen, *figures, *steps, *words), most=None)


def teachers_answers() -> Arm:
    """SFT on the teacher's answer to each prompt."""
    return rejection(
        1, TAUGHT, *TAUGHT_FOR_LONGER, f"stages.sample.models=[{TEACHER}]",
        "stages.best.rule=first", "stages.best.minimum_score=null",
    )  # fmt: skip


UNJUDGED = "stages.online_dpo.judged_by=[]"  # by a model; the judge asks none
SAME_PROMPTS = ("data@stages.sample.data=online_prompts",)  # those that live stages ask, in their order


def rejection(per_prompt: int, prompts: int, *words: str) -> Arm:
    """SFT on what is kept of the model's answers: by default a right one of each prompt that has one."""
    drawn = (f"stages.sample.per_prompt={per_prompt}", f"stages.sample.prompts={prompts}")
    return Arm("rejection_sampling", "rejection", (*SAME_PROMPTS, *drawn, *words))


def picked(per_prompt: int, prompts: int) -> Arm:
    """SFT on that answer to each of these prompts which a reward model prefers: Llama 3's way."""
    judged = (f"judge@stages.score.judge={REWARD_MODEL}", f"stages.score.judged_by=[{REWARD_MODEL}]")
    return rejection(per_prompt, prompts, *judged, "stages.best.minimum_score=null")


def own_answers(per_prompt: int, prompts: int) -> Arm:
    """SFT on the first answer to each of rejection sampling's prompts: nobody has selected among them."""
    return rejection(per_prompt, prompts, "stages.best.rule=first", "stages.best.minimum_score=null")


def randomly_chosen(per_prompt: int, prompts: int) -> Arm:
    """SFT on that answer to each of these prompts which a number that has nothing to do with it prefers."""
    return rejection(per_prompt, prompts, "judge@stages.score.judge=random", "stages.best.minimum_score=null")


# ---- what is owed ----


def of_policy_gradients(change: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mirror descent against its aim, and against the controls."""
    gain = change["mirror descent"][EXACT]
    controls = ("mirror descent, random reward", "own answers, not selected")
    best_control = max(change[name][EXACT]["mean"] for name in controls)
    says = "Mirror descent raises held-out exact match"
    return [
        claims.mean(says, gain["values"], at_least=0.05),
        claims.worst(says, gain["values"], above=0.0),
        claims.claim("It gains more than the better of two controls", gain["mean"] - best_control, above=0.0),
    ]


def of_online_dpo(change: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The held-out reward rises, by more than a control's, and exact match is not what pays for it."""
    gain, exact = change["online DPO"][DRAWN], change["online DPO"][EXACT]
    control = max(change[name][DRAWN]["mean"] for name in ("random reward", "own answers, not selected"))
    modelled = change["judged by a reward model"]
    return [
        claims.worst("Online DPO raises the held-out mean reward", gain["values"], above=0.0),
        claims.claim("It gains more than the better of two controls", gain["mean"] - control, above=0.0),
        claims.claim(
            "It costs exact match at most .02, mean change over seeds",
            exact["mean"], {"values": exact["values"]}, at_least=-0.02,
        ),
        claims.worst("Judged by a reward model it raises that judge's mean", modelled[MODELLED]["values"], above=0.0),
        claims.mean("That costs exact match at most .02", modelled[EXACT]["values"], at_least=-0.02),
    ]  # fmt: skip


def of_qwen2_end(change: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The reward model's mean rises, by more than a control's, and exact match is not what pays for it."""
    found, control = change["as the recipe has it"], change["random reward"]
    gain, exact = found[MODELLED], found[EXACT]
    more = gain["mean"] - control[MODELLED]["mean"]
    return [
        claims.worst("Qwen 2's online DPO raises the held-out mean reward", gain["values"], above=0.0),
        claims.claim("It gains more than a random reward", more, above=0.0),
        claims.mean("It costs exact match at most .02", exact["values"], at_least=-0.02),
        claims.worst("It costs exact match at most .02", exact["values"], at_least=-0.02),
    ]


def of_teachers(change: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the student says itself, corrected, makes it better, and by more than what the teacher says."""
    gain, sequences = change["own answers, reverse KL"][EXACT], change["the teacher's answers"][EXACT]
    more = gain["mean"] - sequences["mean"]
    return [
        claims.worst("On-policy distillation raises held-out exact match", gain["values"], above=0.0),
        claims.claim("It gains more than SFT on as many of the teacher's answers", more, above=0.0),
    ]


def of_hacking(change: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A reward that can be hacked is, and is not where a verifier stands beside it."""
    hacked = change["substring"]
    found = [
        claims.claim("The substring reward rises", hacked["reward/substring"]["mean"], above=0.0),
        claims.claim("Greedy answers are right less often", hacked[EXACT]["mean"], below=0.0),
    ]
    held = {"the KL term": "substring, with the KL term", "the exact answer beside it": "substring and exact answer"}
    return found + [
        claims.claim(f"Not with {what}", change[arm][EXACT]["mean"], above=0.0) for what, arm in held.items()
    ]


def of_rejection_sampling(change: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Right answers against their aim, and against the controls."""
    gain = change["right answers"][EXACT]
    best_control = max(change[name][EXACT]["mean"] for name in ("random reward", "own answers, not selected"))
    says = "Rejection sampling raises held-out exact match"
    return [
        claims.mean(says, gain["values"], at_least=0.05),
        claims.worst(says, gain["values"], above=0.0),
        claims.claim("It gains more than the better of two controls", gain["mean"] - best_control, above=0.0),
    ]


PROMPTS, PER_PROMPT = 1024, 8  # of a policy gradient: 32 records of 32 prompts, two steps from each
ONLINE_PROMPTS, ONLINE_PER_PROMPT = 2048, 4  # of online DPO: 32 steps of 64 pairs
TEACHER = "taught"  # a stage: SFT of the same size from the same model, of more examples
TAUGHT = 3840  # prompts, a response to each: 120 steps of 32
TAUGHT_FOR_LONGER = (
    f"+stage@stages.{TEACHER}=sft", f"stages.{TEACHER}.starts_from=long_context", f"stages.{TEACHER}.examples=30000",
    f"stages.{TEACHER}.epochs=2", f"stages.{TEACHER}.context=1024", f"stages.{TEACHER}.batch_tokens=1024",
    f"stages.{TEACHER}.lr={{peak: 5e-3, final: 5e-4, warmup_share: 0.03}}", f"stages.{TEACHER}.evaluate=false",
)  # fmt: skip
BASIC = {EXACT: "exact match", DRAWN: "right when drawn", KL: "KL to SFT, nats"}
CURVES = {"reward/mean": "mean reward of what is drawn", "kl/reference": "KL to the SFT model, nats per response"}
PARTS = {
    "policy_gradients": Part(
        {
            "mirror descent": policy_gradient("mdpo"),
            "PPO, token ratios": policy_gradient("ppo"),
            "RLOO": policy_gradient("rloo"),
            "GRPO": policy_gradient("grpo"),
            "DAPO": policy_gradient("dapo"),
            "rejection sampling": rejection(PER_PROMPT, PROMPTS),
            "mirror descent, random reward": policy_gradient("mdpo", judge="random"),
            "own answers, not selected": own_answers(PER_PROMPT, PROMPTS),
        },
        BASIC,
        CURVES,
        "policy_optimisation.svg",
        of_policy_gradients,
    ),
    "rejection_sampling": Part(
        {
            "right answers": rejection(PER_PROMPT, PROMPTS),
            "picked by a reward model": picked(PER_PROMPT, PROMPTS),
            "random reward": randomly_chosen(PER_PROMPT, PROMPTS),
            "own answers, not selected": own_answers(PER_PROMPT, PROMPTS),
        },
        BASIC,
        {},
        "rejection_sampling.svg",
        of_rejection_sampling,
    ),
    "online_dpo": Part(
        {
            "online DPO": online_dpo("exact_answer"),
            "judged by a reward model": online_dpo(
                REWARD_MODEL, f"stages.online.judged_by=[{REWARD_MODEL}]", most=None
            ),
            "random reward": online_dpo("random"),
            "own answers, not selected": own_answers(ONLINE_PER_PROMPT, ONLINE_PROMPTS),
        },
        BASIC,
        CURVES,
        "online_dpo.svg",
        of_online_dpo,
    ),
    "hacking": Part(
        {
            "substring": policy_gradient("mdpo", "stages.rlhf.objective.beta=0", judge="substring"),
            "substring, with the KL term": policy_gradient("mdpo", "stages.rlhf.objective.beta=0.1", judge="substring"),
            "substring and exact answer": policy_gradient(
                "mdpo",
                "stages.rlhf.objective.beta=0",
                "~stages.rlhf.judge.parts.form",
                "~stages.rlhf.judge.parts.length",
                "+judge@stages.rlhf.judge.parts.anywhere.judge=substring",
                judge="weighted",
                most=2.0,
            ),
        },
        {"reward/substring": "substring reward", **BASIC, "responses/length": "tokens"},
        CURVES | {"reward/mean": "mean reward, share of the most", "responses/length": "tokens of a response"},
        "reward_hacking.svg",
        of_hacking,
    ),
    "teacher": Part(
        {
            "own answers, reverse KL": of_teacher(),
            "own answers, forward KL": of_teacher("stages.gkd.objective.direction=forward"),
            "own answers, Jensen-Shannon": of_teacher("stages.gkd.objective.direction=jensen_shannon"),
            "the teacher's answers": teachers_answers(),
            "own answers, not selected": own_answers(1, TAUGHT),
            "the teacher itself": replace(of_teacher("stages.gkd.evaluate=false"), stage=TEACHER, until="gkd"),
        },
        BASIC,
        {},
        "on_policy_distillation.svg",
        of_teachers,
    ),
    "qwen2_end": Part(
        {
            "as the recipe has it": ending(),
            "without online merging": ending("stages.online_dpo.optimizer.online_merging.method=none"),
            "judged by the exact answer": ending("judge@stages.online_dpo.judge=exact_answer", UNJUDGED),
            "random reward": ending("judge@stages.online_dpo.judge=random", UNJUDGED),
        },
        {MODELLED: "held-out reward", **BASIC},
        {},
        "qwen2_end.svg",
        of_qwen2_end,
        OFFLINE_DPO,
    ),
}


def measure(name: str, arguments: Namespace) -> trials.Result:
    """A part of the result."""
    part = PARTS[name]
    runs = trained(part.arms, part.beginning, arguments)
    return {"overrides": [*part.beginning.words, *trials.without_places(arguments.overrides)], **summarise(part, runs)}


def trained(arms: Mapping[str, Arm], beginning: Beginning, arguments: Namespace) -> dict[str, list[dict[str, Any]]]:
    """Figures of all models of some arms; runs go on side by side, models are measured one after another."""

    def run(seed: int, name: str, overrides: Sequence[str]) -> Path:
        arm = arms[name]
        last = arm.stage if arm.until is None else arm.until
        until = (f"until={last}",) if last else ()
        words = (f"recipe={arm.recipe}", f"seed={seed}", *until, *beginning.words, *arm.words)
        return trials.run(*words, f"stages.{arm.stage}.evaluate=false", *overrides)

    folders = trials.of_arms(run, arms, arguments)
    return {
        name: [figures_of(folder, arms[name], beginning.stage) for folder in each] for name, each in folders.items()
    }


def figures_of(folder: Path, arm: Arm, beginning: str) -> dict[str, Any]:
    """One model: figures of it and of the stage's that it comes from, seconds, and what was followed on the way."""
    measured, artifact = HeldOut(folder), folder / "artifacts" / arm.stage
    found = {
        "before": measured.figures(beginning),
        "after": measured.figures(arm.stage),
        "seconds": seconds_of(folder, arm),
        "on_the_way": learning_curves.on_the_way(artifact),
        "curves": {},
    }
    rollout = read(artifact / "stage.json")["settings"].get("rollout")
    if rollout and arm.most is not None:
        each = rollout["per_prompt"] / rollout["epochs"]
        found["curves"] = learning_curves.followed(artifact, each, arm.most)
    return found


def seconds_of(folder: Path, arm: Arm) -> dict[str, float]:
    """Of all that comes after the SFT model: the phases of a live stage, or each stage where there are several."""
    names = ["sample", "score", "best", arm.stage] if arm.stage == "rejection" else [arm.stage]
    names += [REWARD_MODEL] if any(REWARD_MODEL in word for word in arm.words) else []
    stages = {name: read(folder / "artifacts" / name / "stage.json")["seconds"] for name in names}
    if len(stages) == 1:
        return stages[arm.stage]
    each: dict[str, float] = {name: seconds["total"] for name, seconds in stages.items()}
    return {**each, "total": sum(each.values())}


def summarise(part: Part, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """A part of the result: figures before and after with their spread, changes within seeds, claims, curves."""
    before = spreads([each["before"] for each in next(iter(found.values()))])
    arms = {}
    for arm, runs in found.items():
        after = spreads([each["after"] for each in runs])
        own = spreads([each["before"] for each in runs])
        arms[arm] = {
            "words": list(part.arms[arm].words),
            "after": after,
            "change": changes(own, after),
            "seconds": spreads([each["seconds"] for each in runs]),
            "on_the_way": spreads([each["on_the_way"] for each in runs]),
            "curves": learning_curves.mean([each["curves"] for each in runs]),
        }
    judged = part.judged({arm: each["change"] for arm, each in arms.items()})
    return {"claims": judged, "before": before, "arms": arms}


def table(part: str, result: Mapping[str, Any]) -> list[str]:
    """Lines of a part's table: mean and standard deviation over the seeds; changes are within a seed."""
    columns = PARTS[part].columns
    head = ["", *columns.values(), "change of exact match", "by seed"]
    rows = [[PARTS[part].beginning.called, *(shown(result["before"].get(name)) for name in columns), "", ""]]
    for arm, found in result["arms"].items():
        change = found["change"][EXACT]
        rows.append(
            [
                arm,
                *(shown(found["after"].get(name)) for name in columns),
                shown(change, signed=True),
                figures.by_seed(change),
            ]
        )
    return figures.lines_of_table(head, rows)


def draw(name: str, result: Mapping[str, Any]) -> None:
    """A part's picture."""
    part, arms = PARTS[name], result[name]["arms"]
    if part.curves:
        learning_curves.draw(arms, part.curves, figures.IMAGES / part.picture)
    else:
        shown_changes = {name: head for name, head in part.columns.items() if name != KL}
        learning_curves.draw_changes(arms, shown_changes, figures.IMAGES / part.picture)


def try_arms(arguments: Namespace) -> None:
    """Say what some arms of a part have changed, and write nothing down."""
    for part in (PARTS[name] for name in arguments.parts):
        for arm, runs in trained({arm: part.arms[arm] for arm in arguments.arms}, part.beginning, arguments).items():
            print(arm, [(round(each["before"][EXACT], 3), round(each["after"][EXACT], 3)) for each in runs])


if __name__ == "__main__":
    words = trials.parser(__doc__, RESULT, parts=list(PARTS))
    words.add_argument("--arms", nargs="+", help="only these, and nothing is written down")
    typed = words.parse_args()
    if typed.arms:
        try_arms(typed)
    else:
        trials.publish_parts(typed, RESULT, measure, table, draw)
