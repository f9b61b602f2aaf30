"""Does a committee teach better than one model at equal samples? iTeC for two rounds from an SFT model stopped
half-way: what it has taught by three methods samples, against one model that samples as much, per seed. Writes
results/committee.json and docs/images/committee.svg.

    python benchmarks/committee.py [--seeds 0 1 2] [--jobs 4] [overrides ...]

Both arms of a seed share the SFT model and the first round's samples, ask the same prompts, judge by the exact answer.
What mirror descent draws while it learns in the first round is drawn by the one model as well.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import claims
import figures
import trials
from half_way import DRAWN, EXACT, HALF_WAY, HeldOut

RESULT = claims.RESULTS / "committee.json"
PICTURE = figures.IMAGES / "committee.svg"
ROUNDS, PROMPTS = 2, 1024
SAMPLES = 24  # responses to a prompt in a round, by one model or by all
OF_REINFORCED = 8  # what the member that learns while it draws has drawn in a round, for as many prompts
INSIDE = "stages.itec.stages"
MEMBERS = ("distilled", "preferred", "reinforced")  # of a round; before the first there is the SFT model alone
COMMITTEE, ALONE = "committee of three", "one model"
PER_PROMPT = {COMMITTEE: [SAMPLES, SAMPLES // len(MEMBERS)], ALONE: [SAMPLES, SAMPLES + OF_REINFORCED]}
ARMS = {  # arm -> what is typed
    COMMITTEE: [f"{INSIDE}.reinforced.examples={PROMPTS}", f"{INSIDE}.reinforced.rollout.per_prompt={OF_REINFORCED}"],
    ALONE: [
        f"{INSIDE}.sample.models=[previous_round.distilled]",
        *(f"~{INSIDE}.{stage}" for stage in ("pairs", "preferred", "reinforced")),
    ],
}


def members(arm: str) -> Sequence[str]:
    """Those whom a round of an arm trains."""
    return ["distilled"] if arm == ALONE else list(MEMBERS)


def names(member: str) -> list[str]:
    """The stages of a member: the SFT model, and of each round."""
    return ["sft", *(f"itec{turn + 1}.{member}" for turn in range(ROUNDS))]


def words(arm: str) -> list[str]:
    """All that an arm types; its models are measured here, not by their stages."""
    drawn = [f"{INSIDE}.sample.prompts={PROMPTS}", f"+stages.itec.by_round.sample.per_prompt={PER_PROMPT[arm]}"]
    alone = [f"~stages.itec.begins_with.{member}" for member in MEMBERS if member != "distilled"]
    quiet = [f"{INSIDE}.{member}.evaluate=false" for member in members(arm)]
    return [*HALF_WAY, *drawn, *ARMS[arm], *alone, *quiet]


def train(seed: int, arm: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Held-out figures of each member round by round, and who won where."""
    found = {}
    for member in members(arm):  # what it does not need is left out, as the first committee's DPO
        *_, last = names(member)
        folder = trials.run("recipe=itec", f"seed={seed}", f"until={last}", *words(arm), *overrides)
        found[member] = [HeldOut(folder).figures(name) for name in names(member)]
    tables = [trials.read(folder / "artifacts" / f"itec{turn + 1}.best" / "table.json") for turn in range(ROUNDS)]
    print(f"seed {seed}, {arm}: {[round(each[EXACT], 3) for each in found['distilled']]}", flush=True)
    return {"members": found, "tables": tables}


def measure(arguments: Namespace) -> trials.Result:
    """The result."""
    return summarise(trials.of_arms(train, ARMS, arguments))


def summarise(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Every member round by round with its spread and its change against the SFT model of its seed, tables, claims.

    Args:
        found: arm -> what `train` says of each seed.
    """
    arms: dict[str, Any] = {}
    for arm, runs in found.items():
        before = trials.spreads([run["members"]["distilled"][0] for run in runs])
        each = {}
        for member in members(arm):
            rounds = [trials.spreads([run["members"][member][turn] for run in runs]) for turn in range(ROUNDS + 1)]
            each[member] = [{"figures": own, "change": trials.changes(before, own)} for own in rounds]
        arms[arm] = {"words": list(ARMS[arm]), "members": each, "tables": [run["tables"] for run in runs]}
    gains = {arm: each["members"]["distilled"][-1]["change"][EXACT]["values"] for arm, each in arms.items()}
    return {
        "claims": [
            claims.mean("The distilled model of the last round gains exact match", gains[COMMITTEE], at_least=0.05),
            claims.mean(
                "It gains more than one model that samples as much",
                trials.differences(gains[COMMITTEE], gains[ALONE]),
                above=0.0,
            ),
        ],
        "overrides": list(HALF_WAY),
        "prompts": PROMPTS,
        "per_prompt": PER_PROMPT,
        "arms": arms,
    }


# ---- what docs/methods/rejection_sampling.md shows ----


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of the table of members: exact match round by round, mean and standard deviation over the seeds."""
    turns = ["before", *(f"round {turn + 1}" for turn in range(ROUNDS))]
    head = ["", "model", *(f"exact match, {turn}" for turn in turns), "right when drawn, at last", "change, by seed"]
    rows = []
    for arm, found in result["arms"].items():
        for member, rounds in found["members"].items():
            exact = [figures.shown(each["figures"][EXACT]) for each in rounds]
            last = rounds[-1]
            drawn, change = figures.shown(last["figures"][DRAWN]), figures.by_seed(last["change"][EXACT])
            rows.append([arm, member, *exact, drawn, change])
    return figures.lines_of_table(head, rows)


def table_of_winners(result: Mapping[str, Any]) -> list[str]:
    """Lines of the table of who won where, in the last round, seed by seed."""
    head = ["seed", "model", "mean score", "among the best of a prompt", "alone right", "kept"]
    rows: list[list[str]] = []
    for seed, tables in zip(result["seeds"], result["arms"][COMMITTEE]["tables"], strict=True):
        for model, entry in tables[-1]["models"].items():
            shares = [f"{entry[name]:.1%}" for name in ("best_or_tied", "right_alone")]
            rows.append([str(seed), model, f"{entry['score']:.3f}", *shares, f"{entry['kept']:,}"])
    return figures.lines_of_table(head, rows)


def draw(result: Mapping[str, Any]) -> None:
    """Exact match and rewards against the SFT model round by round, the mean of the seeds; a dot a seed at the end."""
    shown = {EXACT: "exact match", DRAWN: "right when drawn"}
    with figures.drawing(PICTURE, columns=len(shown), size=(9, 3.4)) as panels:
        for axes, (name, label) in zip(panels, shown.items(), strict=True):
            lines = [(arm, member) for arm, each in result["arms"].items() for member in each["members"]]
            for number, (arm, member) in enumerate(lines):
                changes = [each["change"][name] for each in result["arms"][arm]["members"][member]]
                style = ":" if arm == ALONE else "-"
                text = f"{arm}: {member}"
                axes.plot([each["mean"] for each in changes], style, color=f"C{number}", marker=".", label=text)
                figures.dots(axes, ROUNDS, changes[-1]["values"], f"C{number}")
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_xticks(range(ROUNDS + 1), ["before", *(f"round {turn + 1}" for turn in range(ROUNDS))])
            axes.set_ylabel(f"{label}, against the SFT model")
        panels[0].legend(fontsize=7, frameon=False)


if __name__ == "__main__":
    trials.publish(__doc__, RESULT, measure, table, draw)
