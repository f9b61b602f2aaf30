"""docs/performance.md and its pictures, from benchmarks/results/*.json alone: no figure is typed.

python benchmarks/page.py
"""

from __future__ import annotations

import json
from typing import Any

import machine
from claims import RESULTS
from figures import lines_of_table

DOCS = machine.REPOSITORY / "docs"
NAMES = {
    "ours": "ours",
    "litgpt": "LitGPT",
    "transformers": "transformers",
    "trl": "TRL",
    "lightning": "ours, Lightning's loop",
    "ours_in_backward": "ours, in the backward pass",
    "ours_kernel_by_kernel": "ours, kernel by kernel",
    "dense": "dense",
    "torch_fused": "torch, linear_cross_entropy",
    "liger": "Liger",
    "limit": "matrix products alone",
}
PARTS = {
    ("pretrain", "full_rows"): "Pre-training, 4 x 512 tokens",
    ("pretrain", "compiled"): "Pre-training, 4 x 512 tokens, compiled",
    ("pretrain", "mixed"): "Pre-training, 8 documents of 32 to 512 tokens",
    ("pretrain", "lightning"): "Lightning's loop over a bare one",
    ("sft", "unpacked"): "SFT, 8 conversations of 32 to 512 tokens",
    ("dpo", "online"): "DPO, 8 pairs, reference asked in each step",
    ("dpo", "precomputed"): "DPO, 8 pairs, reference asked before",
    ("reward", "pairs"): "Reward model, 8 pairs",
    ("generate", "batch"): "Sampling, 32 prompts of 160 tokens, 64 new ones each",
    ("generate", "samples"): "Sampling, 8 prompts of 160 tokens, 8 x 64 new ones each",
    ("generate", "mixed"): "Sampling, 128 responses of 8 to 128 tokens in 32 places",
}
SOURCES = ["pretrain", "sft", "dpo", "reward", "generate", "vocabulary", "gpu"]
BACKENDS = ("flash", "varlen", "flex", "sdpa")
GPU_PARTS = ("attention", "training", "distillation", "vocabulary", "generation")
GPU_VOCABULARY = ("ours", "ours_in_backward", "dense", "torch_fused", "liger")  # ways that benchmarks/gpu.py knows
GPU_LIBRARIES = ("torch", "transformers", "flash-attn", "liger-kernel", "triton")
Results = dict[str, dict[str, Any]]  # benchmark -> part -> what was found

INTRODUCTION = """# Performance

Ours beside the newest versions of what people use, on the same weights and tokens, in float32 on one thread. Made by
`make bench`; this page and its pictures are drawn from `benchmarks/results/*.json` by `benchmarks/page.py`. What was
measured in bf16 on a GPU, in another way, has a section of its own ([One GPU](#one-gpu)); all before it is of a CPU.

Each library runs in a process and an environment of its own (LitGPT and transformers 5 do not install together) and
makes one call, a whole training step, at a time: ours, a peer, another, ours again. What counts are ratios of
CPU-seconds of calls made side by side; absolute times swing severalfold from machine to machine. No result of training
or of the vocabulary is written unless the losses of the first call agree to 1e-4. Peak memory is the process's
high-water mark above what its imports take. Medians are of 20 calls of each after 3 to warm up; of sampling 8 after 1,
of the vocabulary 8 after 1 (3 and 2 for its largest sizes).

The model is a Llama of 6.5 million weights: vocabulary 8,192 (tied), width 256, 6 layers, 8 heads of 32 with 4 for
keys and values, feed-forward 704. Every library gets the same fused AdamW, clipping and learning rate. TRL's trainers
run as they come, but in float32 and without gradient checkpointing, which would cost them time. Ours post-trains
through Lightning's loop.
"""


def load() -> Results:
    paths = ((name, RESULTS / f"{name}.json") for name in SOURCES)
    return {name: json.loads(path.read_text()) for name, path in paths if path.exists()}


def page(results: Results) -> str:
    """The whole text; the pictures are only referred to."""
    claims = [entry for parts in results.values() for found in parts.values() for entry in found["claims"]]
    return "\n".join(
        [
            INTRODUCTION,
            "![Times the rate of each peer](images/performance.svg)\n",
            "## Figures\n",
            "Rate: useful tokens (or pairs) per CPU-second, ours over the peer's, and CPU-seconds of a call: medians",
            "with their quartiles. Memory: our peak over the peer's.\n",
            *lines_of_table(
                ["", "peer", "rate", "quartiles", "memory", "ours, CPU-s", "peer's, CPU-s"], figure_rows(results)
            ),
            *vocabulary_section(results.get("vocabulary", {})),
            *gpu_section(results.get("gpu", {})),
            "\n## What falls short\n",
            *fallen_short(claims),
            "\n## All claims\n",
            *lines_of_table(["claim", "value", "bound", "holds"], [claim_row(entry) for entry in claims]),
            "\n## Where it was measured\n",
            *lines_of_table(["", "processor", "commit", "date"], machines(results)),
            "",
            *versions(results),
            "",
        ]
    )


def figure_rows(results: Results) -> list[list[str]]:
    rows = []
    for (benchmark, part), title in PARTS.items():
        found = results.get(benchmark, {}).get(part)
        for peer, ratio in found["ratios"].items() if found else ():
            ours, theirs = found["workers"]["ours"], found["workers"][peer]
            rows.append(
                [
                    title,
                    NAMES[peer],
                    f"**{ratio['median']:.2f}**",
                    f"{ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}",
                    f"{ours['peak_bytes'] / theirs['peak_bytes']:.2f}",
                    with_quartiles(ours["cpu_seconds"]),
                    with_quartiles(theirs["cpu_seconds"]),
                ]
            )
    return rows


def with_quartiles(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['lower_quartile']:.2f} to {found['upper_quartile']:.2f})"


def vocabulary_section(sizes: dict[str, Any]) -> list[str]:
    if not sizes:
        return []
    return [
        "\n## The vocabulary's loss\n",
        "Time and memory of the loss and its gradients on 2,048 hidden states of width 256.\n",
        "![Time and memory by vocabulary](images/vocabulary.svg)\n",
        *lines_of_table(["V", "way", "CPU-s", "times ours", "peak MiB"], vocabulary_rows(sizes)),
        *refusals(sizes),
    ]


def vocabulary_rows(sizes: dict[str, Any]) -> list[list[str]]:
    return [
        [
            f"{int(size):,}",
            NAMES[name],
            with_quartiles(worker["cpu_seconds"]),
            f"{found['ratios'][name]['median']:.2f}" if name in found["ratios"] else "1",
            f"{worker['peak_bytes'] / 2**20:,.0f}",
        ]
        for size, found in sizes.items()
        for name, worker in found["workers"].items()
    ]


def gpu_section(parts: dict[str, Any]) -> list[str]:
    """What `benchmarks/gpu.py` has found; parts that it has not measured are named."""
    if not parts:
        return []
    gpu = " and ".join(dict.fromkeys(part["machine"]["gpu"] for part in parts.values()))
    lines = [
        "\n## One GPU\n",
        f"One {gpu}: wall time, in bf16, all ways in one process and in turns (`benchmarks/gpu.py`).",
        f"Versions: {gpu_versions(parts)}.",
    ]
    if missing := [name for name in GPU_PARTS if name not in parts]:
        lines.append(f"Not measured yet: {', '.join(missing)}.")
    if attention := parts.get("attention"):
        heads, key_heads, width = attention["heads"]
        lines += [
            f"\nAttention of one layer forward and backward, {attention['tokens']:,} tokens, {heads} heads of {width}",
            f"with {key_heads} for keys and values: milliseconds (TFLOP/s over the pairs that are seen).\n",
            *lines_of_table(["batch", *BACKENDS], [attention_row(*item) for item in attention["batches"].items()]),
        ]
    if vocabulary := parts.get("vocabulary"):
        tokens, width, size = vocabulary["shape"]
        rows = [
            [NAMES[name], milliseconds(found), f"{found['peak_bytes'] / 2**20:,.0f}"]
            for name, found in vocabulary["found"].items()
        ]
        lines += [
            f"\nThe vocabulary's loss and its gradients: {tokens:,} tokens of width {width:,}, V = {size:,}.\n",
            *lines_of_table(["way", "ms", "peak MiB"], rows),
            *refusals({"": vocabulary}),
        ]
        if untried := [name for name in GPU_VOCABULARY if name not in {**vocabulary["found"], **vocabulary["refused"]}]:
            lines.append(f"\nNot measured there: {' and '.join(NAMES[name] for name in untried)}.")
    if training := parts.get("training"):
        rows = [
            [name, way, milliseconds(found), f"{found['tokens_per_second']:,.0f}"]
            for name, batch in training["batches"].items()
            for way, found in batch["found"].items()
        ]
        lines += [
            f"\nA training step, {training['model']}, weights in fp32 and products in bf16.\n",
            *lines_of_table(["batch", "way", "ms", "tokens a second"], rows),
            *(
                f"\n{name}: {way} did not run here: `{why}`."
                for name, batch in training["batches"].items()
                for way, why in batch.get("refused", {}).items()
            ),
        ]
    if distillation := parts.get("distillation"):
        plain = distillation["found"]["plain"]["seconds"]["median"]
        rows = [
            [
                way,
                milliseconds(found),
                f"{found['seconds']['median'] / plain:.3f}",
                f"{found['peak_bytes'] / 2**20:,.0f}",
            ]
            for way, found in distillation["found"].items()
        ]
        lines += [
            "\nThe same step, full rows, with a teacher of the student's size: what is kept of it for each token,",
            "or its whole distribution, for which it runs in every step.\n",
            *lines_of_table(["teacher", "ms", "of a plain step", "peak MiB"], rows),
            *(f"\n{way} did not run here: `{why}`." for way, why in distillation["refused"].items()),
        ]
    if generation := parts.get("generation"):
        count, length, new = generation["prompts"]
        ways = list(dict.fromkeys(way for batch in generation["batches"].values() for way in batch["found"]))
        rows = [
            [
                name,
                *(f"{batch['found'][way]['tokens_per_second']:,.0f}" if way in batch["found"] else "" for way in ways),
            ]
            for name, batch in generation["batches"].items()
        ]
        lines += [
            f"\nSampling {count} responses of {new} tokens to prompts of {length}, {generation['model']}:",
            "tokens a second.\n",
            *lines_of_table(["", *(NAMES[way] for way in ways)], rows),
        ]
    return lines


def gpu_versions(parts: dict[str, Any]) -> str:
    """What the GPU's parts were measured with, where they differ all of them."""
    found = {
        f"{library} {version}"
        for part in parts.values()
        for library, version in part["machine"]["libraries"].items()
        if library in GPU_LIBRARIES
    }
    return ", ".join(sorted(found))


def attention_row(name: str, batch: dict[str, Any]) -> list[str]:
    cells = [
        f"{milliseconds(batch['found'][backend])} ({batch['found'][backend]['tflops']:.0f})"
        if backend in batch["found"]
        else batch["refused"][backend]
        for backend in BACKENDS
    ]
    return [name, *cells]


def milliseconds(found: dict[str, Any]) -> str:
    return f"{found['seconds']['median'] * 1e3:.1f}"


def refusals(sizes: dict[str, Any]) -> list[str]:
    reasons = {(name, why) for found in sizes.values() for name, why in found["refused"].items()}
    return [f"\n{NAMES[name]} did not run here: `{why}`." for name, why in sorted(reasons)]


def fallen_short(claims: list[dict[str, Any]]) -> list[str]:
    short = [entry for entry in claims if not entry["holds"]]
    return [f"- {entry['claim']}: {entry['value']:.3g}, {bound(entry)}." for entry in short] or ["Nothing."]


def claim_row(entry: dict[str, Any]) -> list[str]:
    return [entry["claim"], f"{entry['value']:.3g}", bound(entry), "yes" if entry["holds"] else "**no**"]


def bound(entry: dict[str, Any]) -> str:
    words = {"above": "above", "at_least": "at least", "at_most": "at most", "below": "below"}
    return ", ".join(f"{word} {entry[name]:g}" for name, word in words.items() if name in entry)


def machines(results: Results) -> list[list[str]]:
    rows = []
    for benchmark, parts in results.items():
        for part, found in parts.items():
            place = found["machine"]
            commit = (place["commit"] or "?")[:10] + (" and changes" if place["uncommitted_changes"] else "")
            rows.append(
                [
                    f"{benchmark}, {part}",
                    place.get("gpu") or f"{place['processor']}, {place['cores']} cores",
                    commit,
                    place["date"],
                ]
            )
    return rows


def versions(results: Results) -> list[str]:
    """What the workers ran, each in its own environment; the GPU's section has its own."""
    found = {
        f"{library} {version}"
        for parts in results.values()
        for part in parts.values()
        for worker in part.get("workers", {}).values()
        for library, version in worker["versions"].items()
    }
    return ["Versions on CPUs: " + ", ".join(sorted(found)) + "."]


# ---- pictures ----


def draw(results: Results) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "performance"  # the same picture from the same figures
    draw_rates(results)
    if results.get("vocabulary"):
        draw_vocabulary(results["vocabulary"])


def save(figure: Any, name: str) -> None:
    figure.savefig(DOCS / "images" / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")


def draw_rates(results: Results) -> None:
    """A bar for each peer, with its quartiles, and a line where both are equal."""
    from matplotlib import pyplot

    rows = [
        (f"{title}\nagainst {NAMES[peer]}", ratio)
        for (benchmark, part), title in PARTS.items()
        if part != "lightning"
        for peer, ratio in results.get(benchmark, {}).get(part, {}).get("ratios", {}).items()
    ][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.55 * len(rows) + 0.8))
    medians = [ratio["median"] for _, ratio in rows]
    spread = [
        [ratio["median"] - ratio["lower_quartile"] for _, ratio in rows],
        [ratio["upper_quartile"] - ratio["median"] for _, ratio in rows],
    ]
    bars = axes.barh([title for title, _ in rows], medians, xerr=spread, color="#4477aa", height=0.6)
    axes.bar_label(bars, [f"{median:.2f}" for median in medians], padding=6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times the peer's rate per CPU-second")
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "performance")


def draw_vocabulary(sizes: dict[str, Any]) -> None:
    from matplotlib import pyplot

    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    ordered = sorted(sizes, key=int)
    for name in sizes[ordered[0]]["workers"]:
        workers = [sizes[size]["workers"][name] for size in ordered]
        x = [int(size) for size in ordered]
        time.plot(x, [worker["cpu_seconds"]["median"] for worker in workers], marker="o", label=NAMES[name])
        memory.plot(x, [worker["peak_bytes"] / 2**20 for worker in workers], marker="o", label=NAMES[name])
    for axes, label in ((time, "CPU-seconds"), (memory, "peak memory, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="vocabulary", ylabel=label)
        axes.set_xticks([int(size) for size in ordered], [f"{int(size) // 1024}k" for size in ordered], minor=False)
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    memory.legend(fontsize=8)
    save(figure, "vocabulary")


def main() -> None:
    results = load()
    (DOCS / "performance.md").write_text(page(results))
    draw(results)
    print(DOCS / "performance.md")


if __name__ == "__main__":
    main()
