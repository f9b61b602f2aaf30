"""Does rejection sampling raise held-out exact match? An SFT model stopped half-way: its right answers against two
controls at equal samples, per seed. Writes results/rejection_sampling.json and docs/images/rejection_sampling.svg.

    python benchmarks/rejection_sampling.py [--seeds 0 1 2] [overrides ...]

All arms share the SFT model and its samples, which the store holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine
import torch
from learning import spread

from lightning_llm.data.token_store import TokenStore
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.evaluation.preference import kl_to_reference, response_logps
from lightning_llm.evaluation.tasks import respond, sample_questions
from lightning_llm.models import Transformer

RESULT = Path(__file__).resolve().parent / "results" / "rejection_sampling.json"
PICTURE = machine.REPOSITORY / "docs" / "images" / "rejection_sampling.svg"
HALF_WAY = ["stages.sft.examples=15000"]  # of 21,000: about .5 of the held-out questions are answered rightly
ARMS = {
    "right answers": [],
    "random reward": ["judge@stages.score.judge=random", "stages.best.minimum_score=null"],
    "own answers, not selected": ["stages.best.rule=first", "stages.best.minimum_score=null"],
}
KEPT = ("tasks/exact_match", "tasks/reverse", "tasks/sort", "tasks/largest", "tasks/sum")
KL_QUESTIONS = 400  # held out, one response each


def train(seed: int, arm: str, overrides: list[str]) -> Path:
    """The run folder of one arm."""
    words = [f"seed={seed}", "until=rejection", *HALF_WAY, *ARMS[arm], *overrides]
    with subprocess.Popen(
        machine.command("run", "recipe=rejection_sampling", *words), stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        lines = [line.strip() for line in run.stdout]
    if run.returncode:
        sys.exit(f"{arm}, seed {seed}: exit code {run.returncode}")
    return Path(lines[-1])


def read(folder: Path) -> dict[str, Any]:
    """What a run says of its arm: metrics before and after, of the selection, and seconds of the stages it adds."""
    stages = json.loads((folder / "run.json").read_text())["stages"]
    records = {
        name: json.loads((folder / "artifacts" / name / "stage.json").read_text())
        for name in ("sample", "score", "best", "rejection")
    }
    return {
        "before": {name: stages["sft"]["metrics"].get(name) for name in KEPT},
        "after": {name: stages["rejection"]["metrics"].get(name) for name in KEPT} | {"kl/sft": kl_to_sft(folder)},
        "selection": records["best"]["metrics"],
        "seconds": {name: record["seconds"]["total"] for name, record in records.items()},
        "tokens": records["rejection"]["metrics"]["tokens"],
    }


def kl_to_sft(folder: Path) -> float:
    """KL divergence of the trained policy from the SFT model, in nats per response, over held-out questions."""
    artifacts = folder / "artifacts"
    tokenizer = Tokenizer.load(artifacts / "tokenizer" / "tokenizer")
    held_out = (artifacts / "evaluation.prepare" / "sources" / "tasks").glob("*/validation")
    questions = sample_questions({path.parent.name: TokenStore.open(path) for path in sorted(held_out)}, KL_QUESTIONS)
    policy, reference = (
        Transformer.from_pretrained(artifacts / name / "model").eval() for name in ("rejection", "sft")
    )
    with torch.inference_mode():
        responses = respond(
            policy, questions, decode=tokenizer.decode, stop_ids=tokenizer.stop_ids, max_new_tokens=48, max_tokens=4096,
            temperature=1.0,
        )  # fmt: skip
        prompts, ids = [question.prompt_ids for question in questions], [[response.ids] for response in responses]
        drawn = [response_logps(model, prompts, ids, 4096)[:, 0] for model in (policy, reference)]
    return kl_to_reference(*drawn)


def picture(result: dict[str, Any]) -> str:
    """What each arm has changed of its seed's SFT model: a dot per seed, a bar for the mean."""
    before = result["before"]["tasks/exact_match"]["values"]
    changes = {}
    for arm, found in result["arms"].items():
        after = found["after"]["tasks/exact_match"]["values"]
        changes[arm] = [value - start for value, start in zip(after, before, strict=True)]
    limit = 0.05 + max(abs(value) for values in changes.values() for value in values)

    def x(value: float) -> float:
        return 410 + 200 * value / limit

    body = []
    for place, (arm, values) in enumerate(changes.items()):
        y, mean = 44 + 34 * place, statistics.fmean(values)
        body.append(f'<text x="200" y="{y + 4}" text-anchor="end">{arm}</text>')
        body.append(f'<line x1="210" x2="610" y1="{y}" y2="{y}" class="grid"/>')
        body += [f'<circle cx="{x(value):.1f}" cy="{y}" r="4"/>' for value in values]
        body.append(f'<line x1="{x(mean):.1f}" x2="{x(mean):.1f}" y1="{y - 10}" y2="{y + 10}"/>')
        body.append(f'<text x="622" y="{y + 4}">{mean:+.3f}</text>')
    height = 50 + 34 * len(changes)
    style = (
        "text{font:13px sans-serif;fill:#23262b}circle{fill:#3f74b5;fill-opacity:.65}"
        "line{stroke:#23262b;stroke-width:2}.grid{stroke:#e3e1dc;stroke-width:1}.zero{stroke:#959aa3;stroke-width:1}"
    )
    title = f"Held-out exact match against the SFT model of the same seed, {len(before)} seeds; bars are means"
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

    found = {arm: [read(train(seed, arm, arguments.overrides)) for seed in arguments.seeds] for arm in ARMS}
    one = next(iter(found.values()))
    result = {
        "seeds": arguments.seeds,
        "overrides": [*HALF_WAY, *arguments.overrides],
        "machine": machine.describe(),
        "before": {name: spread([run["before"][name] for run in one]) for name in KEPT},
        "arms": {
            arm: {
                part: {
                    name: spread([run[part][name] for run in runs])
                    for name in runs[0][part]
                    if all(run[part].get(name) is not None for run in runs)
                }
                for part in ("after", "selection", "seconds")
            }
            | {"tokens": runs[0]["tokens"]}
            for arm, runs in found.items()
        },
    }
    arguments.result.parent.mkdir(parents=True, exist_ok=True)
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.result == RESULT:
        PICTURE.write_text(picture(result), "utf-8")
    before = result["before"]["tasks/exact_match"]["mean"]
    for arm, parts in result["arms"].items():
        after = parts["after"]["tasks/exact_match"]
        print(f"{arm}: {before:.3f} -> {after['mean']:.3f}  {' '.join(f'{value:.3f}' for value in after['values'])}")


if __name__ == "__main__":
    main()
