"""docs/performance.md and its pictures out of results/*.json: no figure is typed by hand.

python benchmarks/page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import machine

RESULTS = Path(__file__).resolve().parent / "results"
DOCS = machine.REPOSITORY / "docs"
TITLES = {  # result -> heading
    "pretrain": "Pre-training, against LitGPT and transformers",
    "sft": "Supervised fine-tuning, against TRL",
    "dpo": "DPO, against TRL",
    "vocabulary": "The vocabulary function",
}
HEAD = """# Performance

How fast the same work is done here and elsewhere: a Llama of 6.5 million parameters (vocabulary 8,192, width 256, 6
layers, 8 heads of 32 and 4 of keys, feed-forward 704) in float32 on one thread of a CPU, from the same weights on the
same data. Each library runs in an environment and a process of its own and makes one step at a time in turns with the
others; before anything is timed, the losses of the first step have to agree to 1e-4. A ratio is the other's CPU-
seconds over ours, call by call: the median, and its quartiles in brackets. Above 1 ours is faster. Memory is a
process's peak above what its imports take.

`make bench-peers` makes the environments, `make bench` measures again and writes this page.
"""


def rows_of(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings -> workers, of results with one setting or with several."""
    return (
        {"": figures} if "ours" in figures else {name: part for name, part in figures.items() if isinstance(part, dict)}
    )


def picture_of(name: str) -> str:
    return f"images/performance_{name}.svg"


def draw(name: str, figures: dict[str, dict[str, Any]]) -> None:
    """A bar for each of the others: how much longer it takes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    bars = [
        (" ".join(filter(None, (worker, setting and f"({setting})"))), facts["cpu_ratio_to_ours"])
        for setting, workers in figures.items()
        for worker, facts in workers.items()
        if "cpu_ratio_to_ours" in facts and worker != "limit"
    ]
    labels, ratios = [label for label, _ in bars], [ratio for _, ratio in bars]
    medians = [ratio["median"] for ratio in ratios]
    below = [ratio["median"] - ratio["lower_quartile"] for ratio in ratios]
    above = [ratio["upper_quartile"] - ratio["median"] for ratio in ratios]
    picture, axes = pyplot.subplots(figsize=(8, 0.8 + 0.36 * len(bars)), layout="constrained")
    axes.barh(labels, medians, xerr=[below, above], color="#3b6fb0", ecolor="#222222", height=0.62)
    axes.axvline(1.0, color="#222222", linewidth=1)
    axes.set_xlabel("CPU-seconds over ours (1: as fast)")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(DOCS / picture_of(name), metadata={"Date": None})
    pyplot.close(picture)


def table(figures: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| | CPU-seconds a call | ratio to ours | peak memory |", "| --- | --- | --- | --- |"]
    for setting, workers in figures.items():
        for worker, facts in workers.items():
            label = ", ".join(filter(None, (setting, worker)))
            ratio = facts.get("cpu_ratio_to_ours")
            shown = (
                "" if ratio is None else "{median:.2f} ({lower_quartile:.2f} to {upper_quartile:.2f})".format(**ratio)
            )
            lines.append(
                f"| {label} | {facts['cpu_seconds']['median']:.3f} | {shown} | {facts['peak_bytes'] / 2**20:,.0f} MiB |"
            )
    return lines


def section(name: str, title: str, result: dict[str, Any]) -> str:
    figures, about = rows_of(result["figures"]), result["machine"]
    versions: dict[str, str] = {}
    for workers in figures.values():
        for facts in workers.values():
            versions |= facts["versions"]
    listed = ", ".join(f"{library} {version}" for library, version in sorted(versions.items()))
    notes = [f"{key}: {value}." for key, value in result["figures"].items() if isinstance(value, str)]
    claims = ["| claim | bound | measured | |", "| --- | --- | --- | --- |"]
    for entry in result["claims"]:
        bound = f"at least {entry['at_least']:g}" if "at_least" in entry else f"at most {entry['at_most']:g}"
        verdict = "holds" if entry["holds"] else "**falls short**"
        claims.append(f"| {entry['claim']} | {bound} | {entry['value']:.3g} | {verdict} |")
    measured = (
        f"{about['processor']}, {about['cores']} cores, load {about['load_before']:g} before; "
        f"{result['calls']} calls of each; "
        f"commit {(about['commit'] or '')[:7]}; {listed}."
    )
    picture = f"![Ratios]({picture_of(name)})"
    return "\n".join([f"## {title}", "", picture, "", *claims, "", *table(figures), "", *notes, measured, ""])


def results() -> dict[str, dict[str, Any]]:
    paths = {name: RESULTS / f"{name}.json" for name in TITLES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def text() -> str:
    """The whole page; what was not measured is said to be missing."""
    found = results()
    missing = "Not measured yet.\n"
    parts = [
        section(name, title, found[name]) if name in found else f"## {title}\n\n{missing}"
        for name, title in TITLES.items()
    ]
    return "\n".join([HEAD, *parts])


def main() -> None:
    for name, result in results().items():
        draw(name, rows_of(result["figures"]))
    (DOCS / "performance.md").write_text(text())
    print(DOCS / "performance.md")


if __name__ == "__main__":
    main()
