"""What is a teacher worth at equal tokens, what does keeping a part of it lose, and what does it cost?

    python benchmarks/distillation.py [--parts students speed memory] [--seeds 0 1 2] [--jobs 4] [--teachers FOLDER ...]
        [overrides ...]

Writes results/distillation.json and docs/images/distillation.svg. `students` sweeps the mixture of label and teacher
over the recipe `distillation`, a Hydra multirun for each kind of target and seed; a teacher is asked once. Of the first
seed's teacher and student it also measures how much of their divergence is left in what is kept. Without a teacher that
is there, one for each seed, the recipe trains them, of its own, larger shape. The result says what each teacher was.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import claims
import figures
import held_out_text
import machine
import torch
import trials
from interleave import quartiles
from trials import read, spread

from lightning_llm.data.config import DataConfig, SourceConfig
from lightning_llm.data.packing import StageData
from lightning_llm.losses.distillation import bucket_targets, from_stored, teacher_entropy, to_stored
from lightning_llm.losses.likelihood import kl_divergence
from lightning_llm.models import Transformer
from lightning_llm.objectives.base import Objective
from lightning_llm.objectives.config import CausalLMConfig, DistillationConfig
from lightning_llm.optimization.config import AdamWConfig
from lightning_llm.optimization.window import optimizer_step
from lightning_llm.stages.context import model_directory

PARTS = ("students", "speed", "memory")
RUN = ["recipe=distillation", "until=student", "stages.larger.evaluate=false", "stages.student.evaluate=false"]
RESULT = claims.RESULTS / "distillation.json"
PICTURE = figures.IMAGES / "distillation.svg"
WEIGHTS = (0.0, 0.3, 0.6, 0.9, 1.0)
TARGETS = {"top1": "the teacher's favourite (AFM)", "top_k": "64 kept ids and their tail (Gemma 2)"}
MOST = 16_384  # tokens of a pass
STUDENT = "stages.student.objective"
SIZED = {"student": "held_out", "teacher": "teacher"}  # who -> where its figures are


# ---- students ----


def sweep(
    seed: int, targets: str, weights: Sequence[float], teacher: Sequence[str], overrides: Sequence[str], folder: Path
) -> list[dict[str, Any]]:
    """One multirun over weights: what each student has learnt.

    Args:
        teacher: words that name it; none: it is trained.
    """
    runs = folder / targets / str(seed)
    words = [f"seed={seed}", *teacher, f"{STUDENT}.teacher_weight={','.join(map(str, weights))}"]
    launch("-m", *RUN, *words, f"{STUDENT}.targets={targets}", *overrides, f"runs={runs}")
    return [read_student(path.parent) for path in runs.glob("distillation/*/run.json")]


def launch(*words: str) -> None:
    """`lightning-llm run`, or the end of this."""
    if code := subprocess.run(machine.command("run", *words)).returncode:
        sys.exit(f"{' '.join(words)}: exit code {code}")


def read_student(run: Path) -> dict[str, Any]:
    """A student's figures on held-out text, and where its artifacts lie."""
    record, prepared = read(run / "artifacts" / "student" / "stage.json"), run / "artifacts" / "student.prepare"
    asked = read(run / "artifacts" / "student.teacher" / "stage.json")
    artifacts = {
        "student": (run / "artifacts" / "student").resolve(),
        "teacher": Path(asked["inputs"]["model"]["path"]),
    }
    return {
        "seed": record["seed"],
        "weight": record["settings"]["objective"]["teacher_weight"],
        "held_out": held_out_text.measure(artifacts["student"], prepared),
        "teacher": held_out_text.measure(artifacts["teacher"], prepared),
        "tokens": record["metrics"]["tokens"],
        "seconds": record["seconds"]["train"],
        "origin": origin(artifacts["teacher"]),
        "asked": {name: asked["metrics"][name] for name in ("tokens", "tokens_per_second", "bytes_per_token")},
        "artifacts": {node: str(path) for node, path in artifacts.items()},
    }


def origin(model: Path) -> dict[str, Any]:
    """What a teacher was: the key of its artifact and the tokens that it was trained on, by its stage.json; None for
    either where the folder has no such record, as a model of elsewhere.

    Args:
        model: an artifact, or the directory of a model.
    """
    records = [path for path in (model / "stage.json", model.parent / "stage.json") if path.is_file()]
    record = read(records[0]) if records else {}
    return {"key": record.get("key"), "tokens": record.get("metrics", {}).get("tokens")}


def students(teachers: dict[int, list[str]], overrides: Sequence[str], jobs: int) -> dict[str, Any]:
    """Every weight of every kind of target, and what decides the claims: differences at equal seeds.

    Args:
        teachers: seed -> words that name its teacher.
    """
    with tempfile.TemporaryDirectory() as folder:
        swept = {"top1": WEIGHTS, "top_k": WEIGHTS[1:]}
        calls = [
            (seed, targets, weights, teacher, overrides, Path(folder))
            for targets, weights in swept.items()
            for seed, teacher in teachers.items()
        ]
        sweeps = iter(trials.side_by_side(sweep, calls, jobs))
        found = {
            targets: sorted(
                (student for _ in teachers for student in next(sweeps)),
                key=lambda each: (each["weight"], each["seed"]),
            )
            for targets in swept
        }
        # without a weight the teacher is not heard, whatever is kept
        found["top_k"] = [each for each in found["top1"] if not each["weight"]] + found["top_k"]
        table = {
            targets: {
                str(weight): {
                    figure: spread([each["held_out"][figure] for each in runs if each["weight"] == weight])
                    for figure in ("nats", "right")
                }
                for weight in WEIGHTS
            }
            for targets, runs in found.items()
        }
        teacher = {
            figure: spread([each["teacher"][figure] for each in found["top_k"] if each["weight"] == 1])
            for figure in ("nats", "right")
        }
        kept = measure_kept(Path(folder), found)
    scratch = table["top1"]["0.0"]
    likelier = differences(table["top1"]["0.9"]["right"], scratch["right"])
    judged = [
        claims.worst(
            "A student of the kept distribution against the same from scratch at equal tokens: nats less",
            differences(scratch["nats"], table["top_k"]["1.0"]["nats"]),
            above=0.0,
        ),
        claims.worst(
            "A student of label and favourite at AFM's weight against the same from scratch: nats less",
            differences(scratch["nats"], table["top1"]["0.9"]["nats"]),
            above=0.0,
        ),
        claims.worst("The same by what it finds likeliest: share of tokens right above scratch", likelier, above=0.0),
    ]
    return {
        "parameters": {who: found["top_k"][-1][name]["parameters"] for who, name in SIZED.items()},
        "claims": judged,
        "students": table,
        "teacher": teacher,
        "teachers": {str(each["seed"]): each["origin"] for each in found["top_k"] if each["weight"] == 1},
        "tokens": found["top_k"][-1]["tokens"],
        "asked": {targets: runs[-1]["asked"] for targets, runs in found.items()},
        "kept": kept,
    }


def differences(larger: dict[str, Any], smaller: dict[str, Any]) -> list[float]:
    """Seed by seed, of two spreads."""
    return [round(gain, 5) for gain in trials.differences(larger["values"], smaller["values"])]


# ---- what keeping k ids loses ----


@torch.no_grad()
def measure_kept(folder: Path, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """KL of a teacher and its student on held-out text, from what is kept of the teacher against the whole."""
    run = next((folder / "top_k").glob("*/distillation/*/run.json")).parent
    one = next(each for each in found["top_k"] if each["weight"] == 1)
    teacher, student = (
        Transformer.from_pretrained(model_directory(Path(one["artifacts"][who]))).eval()
        for who in ("teacher", "student")
    )
    rows: dict[str, list[tuple[float, float, float]]] = {}
    whole_sum = count = 0.0
    for batch in held_out_text.batches(run / "artifacts" / "student.prepare"):
        of_teacher, of_student = (model(batch)[batch.predictors] for model in (teacher, student))
        whole = kl_divergence(
            of_student,
            student.head_weight,
            of_teacher,
            teacher.head_weight,
            student_softcap=student.config.final_logit_softcapping,
            teacher_softcap=teacher.config.final_logit_softcapping,
        )
        whole_sum, count = whole_sum + float(whole.sum()), count + len(whole)
        for k, stored_as in itertools.product((1, 8, 64), ("float32", "float16", "uint8")):
            ids, log_p = teacher.top_log_probabilities(of_teacher, batch.target_ids, k)
            mass = float(log_p[:, :k].exp().sum())
            if stored_as != "float32":
                log_p = from_stored(to_stored(log_p, stored_as))
            targets = bucket_targets(batch.target_ids, ids, log_p, 1.0)
            cross = -student.log_likelihood(
                of_student, targets.ids, target_weights=targets.weights, tail_weight=targets.tail
            )
            kept = cross - teacher_entropy(log_p)
            rows.setdefault(f"{k} {stored_as}", []).append((float(kept.sum()), float((kept - whole).abs().sum()), mass))
    return {
        "whole": whole_sum / count,
        "kept": {
            name: {
                "kl": sum(kl for kl, _, _ in parts) / count,
                "missing_share": 1 - sum(kl for kl, _, _ in parts) / whole_sum,
                "error_per_token": sum(error for _, error, _ in parts) / count,
                "mass": sum(mass for _, _, mass in parts) / count,
            }
            for name, parts in rows.items()
        },
    }


# ---- speed ----


def speed(teacher: Sequence[str], overrides: Sequence[str], steps: int = 60) -> dict[str, Any]:
    """CPU-seconds of steps with a kept teacher over those without, in turns on the same windows, on one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for k in (1, 8, 64):
            runs = Path(folder) / str(k)
            words = [f"{STUDENT}.targets=top_k", f"{STUDENT}.k={k}"]
            launch(*RUN, "seed=0", *teacher, *words, *overrides, f"runs={runs}")
            found[str(k)] = ratios(next(runs.glob("distillation/*/run.json")).parent, k, steps)
    ratio = found["64"]["ratio"]["median"]
    judged = [claims.claim("CPU-seconds of a step from 64 kept ids over those of plain training", ratio, at_most=1.15)]
    return {"claims": judged, "kept": found}


def ratios(run: Path, k: int, steps: int) -> dict[str, Any]:
    """Of one k: the two kinds of step in turns."""
    settings = read(run / "artifacts" / "student" / "stage.json")["settings"]
    sources = {name: SourceConfig(weight=source["weight"]) for name, source in settings["data"]["sources"].items()}
    data_config = DataConfig(form="text", sources=sources, max_epochs=1e9)
    options = {
        "context_ramp": settings["context"],
        "batch_ramp": settings["batch_tokens"],
        "total_tokens": settings["tokens"],
        "seed": 0,
    }
    prepared = (run / "artifacts" / "student.prepare").resolve()
    plain = StageData(prepared, data_config, **options)
    taught = StageData(prepared, data_config, **options, teacher=(run / "artifacts" / "student.teacher").resolve())
    seconds: dict[str, list[float]] = {"plain": [], "taught": []}
    trained: dict[str, tuple[StageData, Objective, torch.optim.Optimizer]] = {}
    for name, data, config in (
        ("plain", plain, CausalLMConfig()),
        ("taught", taught, DistillationConfig(targets="top_k", teacher_weight=1.0, k=k)),
    ):
        model = Transformer.from_pretrained(run / "artifacts" / "student" / "model")
        trained[name] = data, config.build(model), AdamWConfig().build(model)
    for index in range(steps + 5):
        for name in trained if index % 2 else reversed(trained):
            data, objective, optimizer = trained[name]
            began = time.process_time()
            window = data.window(index % data.steps, micro_batch_tokens=MOST)
            optimizer_step(
                objective.trained_loss,
                window.mine,
                optimizer,
                units=window.target_tokens,
                tokens=sum(window.consumed.values()),
                learning_rate=1e-5,
                schedule=1.0,
                clip_norm=1.0,
            )
            if index >= 5:
                seconds[name].append(time.process_time() - began)
    pairs = zip(seconds["taught"], seconds["plain"], strict=True)
    return {
        "ratio": quartiles([one / other for one, other in pairs]),
        "tokens_per_cpu_second": {
            name: settings["batch_tokens"][0]["value"] / statistics.median(values) for name, values in seconds.items()
        },
        "vocabulary": settings["model"]["vocab_size"],
        "width": settings["model"]["hidden_size"],
    }


# ---- memory ----

PEAK = """
import json, sys, torch
from lightning_llm.losses.likelihood import token_log_likelihood

def status(name):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

tokens, vocabulary, width, kept = map(int, sys.argv[1:])
torch.set_num_threads(1)
torch.manual_seed(0)
token_log_likelihood(torch.randn(4, 8), torch.randn(16, 8), torch.zeros(4, 1, dtype=torch.int64))  # what is loaded once
hidden = torch.randn(tokens, width, requires_grad=True)
weight = torch.randn(vocabulary, width).mul_(0.02).requires_grad_()
ids = torch.randint(vocabulary, (tokens, kept + 1))
weights, tail = torch.rand(tokens, kept + 1).div_(kept + 1), torch.rand(tokens)
before = status("VmRSS")
options = {"target_weights": weights, "tail_weight": tail, "token_weights": torch.ones(tokens)}
token_log_likelihood(hidden, weight, ids, **options).sum().backward()
print(json.dumps(status("VmHWM") - before - weight.grad.nbytes - hidden.grad.nbytes))
"""
TOKENS, VOCABULARIES, WIDTH, KEPT_IDS = (1024, 4096, 16_384), (16_384, 65_536, 262_144), 32, 64


def memory() -> dict[str, Any]:
    """Bytes that the loss of kept targets takes above its gradients, by tokens and size of the vocabulary."""
    peaks = {}
    for tokens, vocabulary in itertools.product(TOKENS, VOCABULARIES):
        words = [sys.executable, "-c", PEAK, *map(str, (tokens, vocabulary, WIDTH, KEPT_IDS))]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        peaks[f"{tokens} {vocabulary}"] = json.loads(done.stdout)
    share = peaks[f"{TOKENS[-1]} {VOCABULARIES[-1]}"] / (4 * TOKENS[-1] * VOCABULARIES[-1])
    says = (
        f"Memory of {KEPT_IDS} kept ids' loss over that of all logits, {TOKENS[-1]:,} tokens, V = {VOCABULARIES[-1]:,}"
    )
    return {"claims": [claims.claim(says, share, at_most=0.05)], "peaks": peaks}


def measure_part(part: str, arguments: Namespace) -> trials.Result:
    """A part of the result."""
    teachers: dict[int, list[str]] = {seed: [] for seed in arguments.seeds}
    for seed, folder in zip(arguments.seeds, arguments.teachers, strict=bool(arguments.teachers)):
        teachers[seed] = [f"stages.student.learns_from={Path(folder).resolve()}"]
    if part == "students":
        return students(teachers, arguments.overrides, arguments.jobs)
    if part == "memory":
        return memory()
    return speed(teachers[arguments.seeds[0]], arguments.overrides)


# ---- what docs/methods/distillation.md shows ----


def student_table(found: dict[str, Any]) -> list[str]:
    """Held-out nats and share of tokens right by weight of the teacher, mean and standard deviation over the seeds."""
    head = ["weight of the teacher", *(f"{targets}: {figure}" for targets in TARGETS for figure in ("nats", "right"))]
    rows = [[f"{weight:g}"] for weight in WEIGHTS] + [["the teacher itself"]]
    for row, weight in zip(rows, WEIGHTS, strict=False):
        row += [
            figures.shown(found["students"][t][str(weight)][figure]) for t in TARGETS for figure in ("nats", "right")
        ]
    rows[-1] += [figures.shown(found["teacher"][figure]) for _ in TARGETS for figure in ("nats", "right")]
    return figures.lines_of_table(head, rows)


def kept_table(found: dict[str, Any]) -> list[str]:
    """What of the divergence between teacher and student is missing in what is kept, by k and type."""
    head = ["kept", "teacher's mass", "KL", "missing", "mean error of a token's KL"]
    rows = [
        [
            name,
            f"{each['mass']:.3f}",
            f"{each['kl']:.4f}",
            f"{each['missing_share']:.1%}",
            f"{each['error_per_token']:.4f}",
        ]
        for name, each in found["kept"]["kept"].items()
    ]
    return figures.lines_of_table(head, [*rows, ["all", "1", f"{found['kept']['whole']:.4f}", "", ""]])


def memory_table(found: dict[str, Any]) -> list[str]:
    """Peaks over tokens and vocabulary, beside those of all logits."""
    rows = [
        [
            f"{tokens:,}",
            *(
                f"{found['peaks'][f'{tokens} {size}'] / 2**20:,.0f} ({4 * tokens * size / 2**20:,.0f})"
                for size in VOCABULARIES
            ),
        ]
        for tokens in TOKENS
    ]
    return figures.lines_of_table(["tokens", *(f"V = {size:,}" for size in VOCABULARIES)], rows)


def table(part: str, found: dict[str, Any]) -> list[str]:
    """Lines of a part's tables; of speed there is none."""
    if part == "memory":
        return memory_table(found)
    return [*student_table(found), "", *kept_table(found)] if part == "students" else []


def draw(part: str, result: dict[str, Any]) -> None:
    """Held-out loss and share of tokens right over the teacher's weight, a dot for each seed."""
    if part != "students":
        return
    found = result["students"]
    labels = {"nats": "held-out loss, nats per token", "right": "held-out tokens found likeliest"}
    with figures.drawing(PICTURE, columns=2, size=(9.5, 3.6)) as axes:
        for panel, (name, label) in zip(axes, labels.items(), strict=True):
            for targets, says in TARGETS.items():
                each = found["students"][targets]
                [line] = panel.plot(WEIGHTS, [each[str(weight)][name]["mean"] for weight in WEIGHTS], label=says)
                for weight in WEIGHTS:
                    figures.dots(panel, weight, each[str(weight)][name]["values"], line.get_color())
            mean = found["teacher"][name]["mean"]
            panel.axhline(mean, color="black", linewidth=0.8, linestyle=":", label="the teacher itself")
            panel.set(xlabel="weight of the teacher", ylabel=label)
        axes[0].legend(fontsize=8)


if __name__ == "__main__":
    words = trials.parser(__doc__, RESULT, parts=PARTS)
    words.add_argument("--teachers", nargs="+", default=[], help="folders of models, one for each seed")
    trials.publish_parts(words.parse_args(), RESULT, measure_part, table, draw)
