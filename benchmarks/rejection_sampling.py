"""Does rejection sampling raise held-out exact match? An SFT model stopped half-way: its right answers against two
controls at equal samples, per seed. Writes results/rejection_sampling.json and docs/images/rejection_sampling.svg.

    python benchmarks/rejection_sampling.py [--seeds 0 1 2] [overrides ...]

All arms share the SFT model and its samples, which the store holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import claims
import machine
from half_way import DRAWN, EXACT, HALF_WAY, KL, HeldOut, changes, lines_of_table, read, run, shown, spreads

RESULT = Path(__file__).resolve().parent / "results" / "rejection_sampling.json"
PICTURE = machine.REPOSITORY / "docs" / "images" / "rejection_sampling.svg"
ARMS = {
    "right answers": [],
    "random reward": ["judge@stages.score.judge=random", "stages.best.minimum_score=null"],
    "own answers, not selected": ["stages.best.rule=first", "stages.best.minimum_score=null"],
}
CHOSEN = next(iter(ARMS))  # what the claims are about
COLUMNS = {EXACT: "exact match", **{f"tasks/{task}": task for task in ("reverse", "sort", "largest", "sum")}}
COLUMNS |= {DRAWN: "right when drawn", KL: "KL to SFT, nats"}
STAGES = ("sample", "score", "best", "rejection")  # that an arm adds


def train(seed: int, arm: str, overrides: Sequence[str]) -> dict[str, Any]:
    """One arm: figures before and after, of the selection, and seconds of the stages it adds."""
    words = [f"seed={seed}", "until=rejection", "stages.rejection.evaluate=false", *HALF_WAY, *ARMS[arm], *overrides]
    folder = run("recipe=rejection_sampling", *words)
    measured, records = HeldOut(folder), {name: read(folder / "artifacts" / name / "stage.json") for name in STAGES}
    return {
        "before": measured.figures("sft"),
        "after": measured.figures("rejection"),
        "selection": records["best"]["metrics"],
        "seconds": {name: record["seconds"]["total"] for name, record in records.items()},
        "tokens": records["rejection"]["metrics"]["tokens"],
    }


def judge(arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is owed: right answers raise exact match, by more than either control."""
    gain = arms[CHOSEN]["change"][EXACT]
    control = max(found["change"][EXACT]["mean"] for arm, found in arms.items() if arm != CHOSEN)
    values, says = {"values": gain["values"]}, "Rejection sampling raises held-out exact match"
    return [
        claims.claim(f"{says}, mean over seeds", gain["mean"], values, at_least=0.05),
        claims.claim(f"{says}, worst seed", min(gain["values"]), values, above=0.0),
        claims.claim("It gains more than the better of two controls", gain["mean"] - control, above=0.0),
    ]


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of the table of docs/methods/rejection_sampling.md."""
    rows = [["SFT, half-way", *(shown(result["before"].get(name)) for name in COLUMNS), "", ""]]
    for arm, found in result["arms"].items():
        change = found["change"][EXACT]
        by_seed = " ".join(f"{value:+.3f}" for value in change["values"])
        rows.append([arm, *(shown(found["after"].get(name)) for name in COLUMNS), shown(change, signed=True), by_seed])
    return lines_of_table(["", *COLUMNS.values(), "change of exact match", "by seed"], rows)


def picture(result: dict[str, Any]) -> str:
    """What each arm has changed of its seed's SFT model: a dot per seed, a bar for the mean."""
    found = {arm: each["change"][EXACT]["values"] for arm, each in result["arms"].items()}
    limit = 0.05 + max(abs(value) for values in found.values() for value in values)

    def x(value: float) -> float:
        return 410 + 200 * value / limit

    body = []
    for place, (arm, values) in enumerate(found.items()):
        y, mean = 44 + 34 * place, statistics.fmean(values)
        body.append(f'<text x="200" y="{y + 4}" text-anchor="end">{arm}</text>')
        body.append(f'<line x1="210" x2="610" y1="{y}" y2="{y}" class="grid"/>')
        body += [f'<circle cx="{x(value):.1f}" cy="{y}" r="4"/>' for value in values]
        body.append(f'<line x1="{x(mean):.1f}" x2="{x(mean):.1f}" y1="{y - 10}" y2="{y + 10}"/>')
        body.append(f'<text x="622" y="{y + 4}">{mean:+.3f}</text>')
    height = 50 + 34 * len(found)
    style = (
        "text{font:13px sans-serif;fill:#23262b}circle{fill:#3f74b5;fill-opacity:.65}"
        "line{stroke:#23262b;stroke-width:2}.grid{stroke:#e3e1dc;stroke-width:1}.zero{stroke:#959aa3;stroke-width:1}"
    )
    title = f"Held-out exact match against the SFT model of the same seed, {len(result['seeds'])} seeds; bars are means"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 {height}" role="img"><style>{style}</style>'
        f'<rect width="680" height="{height}" fill="#fff"/><text x="20" y="18">{title}</text>'
        f'<line x1="410" x2="410" y1="28" y2="{height - 12}" class="zero"/>{"".join(body)}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("overrides", nargs="*", help="as on lightning-llm's command line")
    arguments = parser.parse_args()

    found = {arm: [train(seed, arm, arguments.overrides) for seed in arguments.seeds] for arm in ARMS}
    before = spreads([each["before"] for each in found[CHOSEN]])
    arms = {}
    for arm, runs in found.items():
        parts = {part: spreads([each[part] for each in runs]) for part in ("after", "selection", "seconds")}
        arms[arm] = {**parts, "change": changes(before, parts["after"]), "tokens": runs[0]["tokens"]}
    result = {
        "seeds": arguments.seeds,
        "overrides": [*HALF_WAY, *arguments.overrides],
        "machine": machine.describe(),
        "claims": judge(arms),
        "before": before,
        "arms": arms,
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.result == RESULT:
        PICTURE.write_text(picture(result), "utf-8")
    print("\n".join(table(result)))
    for entry in result["claims"]:
        print(f"{'holds' if entry['holds'] else 'FAILS'}  {entry['claim']}: {entry['value']:.4g}")
    claims.finish([entry["holds"] for entry in result["claims"]])


if __name__ == "__main__":
    main()
