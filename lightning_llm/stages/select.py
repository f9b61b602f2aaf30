"""The verb select: of all responses to a prompt those that are learnt from, and a table of who won where.

Leaves `rows.jsonl`, conversations or pairs in the form that `prepare` reads (a source with the path stage:<name>), and
`table.json`.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_llm.evaluation.config import SCORED
from lightning_llm.evaluation.selection import (
    Candidate,
    Group,
    choose,
    choose_pair,
    count_dropped,
    difficulty_class,
    keep_share,
    who_won,
)
from lightning_llm.settings import UserError
from lightning_llm.stages.config import SelectSettings
from lightning_llm.stages.context import StageContext, StageResult
from lightning_llm.stages.samples import ROWS, SAMPLES, VERDICTS, Json, Sampled, read_rows, write_rows

DIGITS = 3  # of shares in the table that is printed


@dataclass
class Prompt:
    """A prompt and all responses to it, wherever they were sampled."""

    messages: list[dict[str, str]]
    task: str
    answer: str
    candidates: list[Candidate] = field(default_factory=list)


def run(context: StageContext) -> StageResult:
    """Choose of every prompt, then among the prompts; the seed decides between equals.

    Raises:
        UserError: nothing is left, or responses are to be chosen by scores that they have not.
    """
    settings: SelectSettings = context.settings
    prompts = list(read_prompts(context.inputs))
    models = list(dict.fromkeys(candidate.model for prompt in prompts for candidate in prompt.candidates))
    groups = [choose_of(prompt, settings) for prompt in prompts]
    rows = [(number, kept) for number, group in enumerate(groups) for kept in units(group, settings.form)]
    classes = [_class(groups[number], settings) for number, _ in rows]
    chance = random.Random(f"{settings.seed} rows")
    stay = [rows[place] for place in keep_share(classes, settings.keep, chance, balance=settings.balance != "none")]
    if not stay:
        raise _keeps_none(context, groups, len(rows))
    write_rows(context.output / ROWS, [_row(prompts[number], kept, settings.form) for number, kept in stay])
    chosen: dict[int, list[int]] = {}
    for number, kept in stay:
        chosen.setdefault(number, []).append(kept[0])
    groups = [replace(group, kept=tuple(chosen.get(number, ()))) for number, group in enumerate(groups)]
    table = who_won(groups, models, right_from=settings.right_from, bins=settings.bins)
    (context.output / "table.json").write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for line in as_text(table):
        context.console.note(line)
    context.console.update(len(prompts), len(prompts), "prompts")
    return StageResult(metrics_of(prompts, groups, len(stay), settings))


# ---- what was sampled and judged ----


def read_prompts(inputs: dict[str, Path]) -> Iterator[Prompt]:
    """Every different prompt of the inputs `samples.<i>.<j>` once, with scores where `verdicts.<i>` has them."""
    found: dict[str, Prompt] = {}
    numbers = sorted({int(role.split(".")[1]) for role in inputs})
    for number in numbers:
        places = sorted(int(role.split(".")[2]) for role in inputs if role.startswith(f"samples.{number}."))
        samples = itertools.chain.from_iterable(
            read_rows(inputs[f"samples.{number}.{place}"] / SAMPLES) for place in places
        )
        verdicts = read_rows(inputs[role] / VERDICTS) if (role := f"verdicts.{number}") in inputs else None
        for row in samples:
            sampled = Sampled.from_json(row)
            scores: Sequence[float | None] = [None] * len(sampled.responses)
            if verdicts is not None:
                scores = [verdict["score"] for verdict in next(verdicts)["verdicts"]]
            identity = json.dumps(sampled.messages, sort_keys=True, ensure_ascii=False)
            prompt = Prompt(sampled.messages, sampled.question.task, sampled.question.answer)
            found.setdefault(identity, prompt).candidates.extend(
                Candidate(response.text, model, response.is_complete, score)
                for response, model, score in zip(sampled.responses, sampled.models, scores, strict=True)
            )
    yield from found.values()


# ---- what is kept ----


def choose_of(prompt: Prompt, settings: SelectSettings) -> Group:
    """What is kept of a prompt: responses, or the chosen and the rejected one of its pair."""
    identity = json.dumps(prompt.messages, ensure_ascii=False)
    chance = random.Random(f"{settings.seed} {identity}")  # whatever other prompts there are
    try:
        if settings.form == "pairs":
            kept = choose_pair(prompt.candidates, settings.rule, chance=chance) or ()
            if kept and settings.minimum_score is not None and settings.rule == "best":
                kept = kept if (prompt.candidates[kept[0]].score or 0.0) >= settings.minimum_score else ()
        else:
            kept = choose(
                prompt.candidates,
                settings.rule,
                count=settings.per_prompt,
                minimum=settings.minimum_score,
                chance=chance,
            )
    except ValueError as error:
        raise UserError("rule", str(error), "Put a stage of kind judge in between, and name it in data") from error
    return Group(prompt.task, tuple(prompt.candidates), tuple(kept))


def units(group: Group, form: str) -> list[tuple[int, ...]]:
    """The places that make one row each."""
    return ([group.kept] if group.kept else []) if form == "pairs" else [(place,) for place in group.kept]


def _class(group: Group, settings: SelectSettings) -> int:
    share = group.share_right(settings.right_from)
    if share is None:
        if settings.balance != "none":
            what = "is by difficulty, and nobody has judged which responses are right"
            raise UserError("balance", what, "Name a stage of kind judge in data, of a judge that is no reward model")
        return 0
    return difficulty_class(share, settings.bins)


def _row(prompt: Prompt, kept: tuple[int, ...], form: str) -> Json:
    """A row as `prepare` reads it, and beside it where it comes from."""
    chosen = prompt.candidates[kept[0]]
    beside = {"task": prompt.task, "model": chosen.model, "score": chosen.score}
    if form == "pairs":
        texts = {"chosen": chosen.text, "rejected": prompt.candidates[kept[1]].text}
        return {"prompt": prompt.messages, **texts, "answer": prompt.answer, **beside}
    return {"messages": [*prompt.messages, {"role": "assistant", "content": chosen.text}], **beside}


def _keeps_none(context: StageContext, groups: Sequence[Group], rows: int) -> UserError:
    """What has become of all responses, and what would mend most of it."""
    settings: SelectSettings = context.settings
    own, scored = f"stages.{context.name}", settings.rule in SCORED
    candidates = [candidate for group in groups for candidate in group.candidates]
    dropped = count_dropped(candidates, settings.minimum_score if scored else None)
    samplers = dict.fromkeys(name for role, name in context.names.items() if role.startswith("samples."))
    longer = " and ".join(f"stages.{name}.max_new_tokens" for name in samplers) or "max_new_tokens of what was sampled"
    minimum = f"{own}.minimum_score"
    if rows:
        return UserError(f"{own}.keep", f"is {settings.keep:g}, and leaves none of {rows:,} rows", "Raise it")
    facts = {
        "cut off": f"{dropped['cut off']:,} were cut off",
        "empty": f"{dropped['empty']:,} say nothing",
        "below": f"{dropped['below']:,} score below {minimum}",
    }
    remedies = {
        "cut off": f"Raise {longer}",
        "empty": "Train longer what was sampled from, or sample more of each prompt",
        "below": f"Lower {minimum}, or sample more of each prompt",
    }
    said = [fact for name, fact in facts.items() if dropped[name]]
    if left := len(candidates) - sum(dropped.values()):  # of pairs alone: one response keeps itself
        said.append(f"{left:,} are not better than another to their prompt")
    most = max(dropped, key=lambda name: dropped[name])
    remedy = remedies[most] if dropped[most] >= left else "Sample more of each prompt, or at a higher temperature"
    return UserError(own, f"keeps none of {len(candidates):,} responses: {', '.join(said)}", remedy)


# ---- what is said of it ----


def metrics_of(
    prompts: Sequence[Prompt], groups: Sequence[Group], rows: int, settings: SelectSettings
) -> dict[str, float]:
    """rows, and of all responses and of those that are kept the mean score and, where a score can be, the share that
    is right."""
    metrics = {"rows": float(rows), "prompts": float(len(prompts))}
    metrics["prompts/kept"] = sum(bool(group.kept) for group in groups) / len(groups)
    for name, candidates in (
        ("all", [candidate for group in groups for candidate in group.candidates]),
        ("kept", [group.candidates[place] for group in groups for place in group.kept]),
    ):
        scores = [candidate.score for candidate in candidates if candidate.score is not None]
        if scores:
            metrics[f"score/{name}"] = sum(scores) / len(scores)
            if settings.right_from is not None:
                metrics[f"right/{name}"] = sum(score >= settings.right_from for score in scores) / len(scores)
    shares = [share for group in groups if (share := group.share_right(settings.right_from)) is not None]
    if shares:
        metrics["right/any"] = sum(share > 0 for share in shares) / len(shares)  # what K samples reach at best
    return metrics


def as_text(table: dict[str, Any]) -> list[str]:
    """The table as lines of a console."""
    parts = {
        "who won": table["models"],
        "by task": table["tasks"],
        "by difficulty": table["difficulty"],
    }
    lines = []
    for title, entries in parts.items():
        if not entries:
            continue
        rows = [[title, *next(iter(entries.values()), {})]]
        rows += [[name, *map(_shown, entry.values())] for name, entry in entries.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            cells = [
                cell.ljust(width) if not i else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.{DIGITS}f}"
