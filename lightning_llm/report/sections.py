"""The sections of the page: each a function from the runs to HTML, or None where they have nothing to say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lightning_llm.report import calibration as calibrated
from lightning_llm.report import charts
from lightning_llm.report.comparison import differences, environment, recipe_text
from lightning_llm.report.graph import LABELS, draw_graph
from lightning_llm.report.needles import GATE_HEADS, answers_said, gate_rows, needle_grids
from lightning_llm.report.needles import maps as needle_maps
from lightning_llm.report.numbers import NOTHING, duration, figure, flops, is_number, measure, quantity, size
from lightning_llm.report.record import Node, Run, visible
from lightning_llm.report.selection import Table, selections, tables

MAPS_IN_A_ROW = 3


@dataclass(frozen=True)
class Section:
    """A part of the page: where links lead, its heading, what is below."""

    anchor: str
    title: str
    html: str


def title(runs: Sequence[Run]) -> str:
    """One run's recipe and scale; of several how many there are and of what."""
    if len(runs) > 1:
        return f"{len(runs)} runs of {', '.join(dict.fromkeys(run.title for run in runs))}"
    return f"{runs[0].title} at {runs[0].scale}" if runs[0].scale else runs[0].title


def header(runs: Sequence[Run]) -> str:
    """What was run, and five figures of it; several runs side by side with the settings in which they differ."""
    heading = f"<h1>{escape(title(runs))}</h1>"
    if len(runs) > 1:
        return heading + _side_by_side(runs)
    run = runs[0]
    facts = [f"seed {run.seed}" if run.seed is not None else None, date(run), commit(run), run.name]
    tiles = {name: value for name, value in totals(run).items() if value != NOTHING}
    boxes = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles.items())
    lead = " · ".join(escape(fact) for fact in facts if fact)
    return f'{heading}<p class="lead">{lead}</p><dl class="tiles">{boxes}</dl>'


def notices(runs: Sequence[Run]) -> str:
    """What is missing, by name."""
    found = list(missing(runs))
    if not found:
        return ""
    return (
        f'<div class="notice"><b>Incomplete.</b><ul>{"".join(f"<li>{escape(line)}</li>" for line in found)}</ul></div>'
    )


def missing(runs: Sequence[Run]) -> Iterable[str]:
    """A line for each thing that the page would tell and cannot."""
    for run in runs:
        which = f"{run.name}: " if len(runs) > 1 else ""
        status = run.facts.get("status", "done")
        if status != "done":
            said = {
                "running": "the run has not ended",
                "failed": "the run failed",
                "stopped": "a gate has stopped the run",
            }
            yield which + said.get(status, f"the run was {status}")
        if run.missing and run.nodes:
            yield f"{which}not made: {', '.join(node.name for node in run.missing)}"
        for problem in run.problems:
            yield which + problem


# ---- the sections, in the order of the page ----


def graph(runs: Sequence[Run]) -> Section | None:
    """The stages as boxes and lines."""
    if not any(run.nodes for run in runs):
        return None
    if len(runs) == 1:
        drawn = draw_graph(runs[0], _anchor(runs, runs[0]))
    else:
        drawn = "".join(
            f"<details{' open' if run is runs[0] else ''}><summary>{_run_mark(runs, run)}</summary>"
            f"{draw_graph(run, _anchor(runs, run))}</details>"
            for run in runs
        )
    return Section(
        "graph", "Stages", f'<p class="soft">Each box is one artifact; a line is what it was made from.</p>{drawn}'
    )


def stages(runs: Sequence[Run]) -> Section | None:
    """A row for every artifact: what it does, from what, how long it took."""
    columns = ["stage", "does", "from", "tokens", "steps", "context", "time", "tokens/s", "utilisation", "size"]
    columns += ["key", ""]
    body = []
    for run in runs:
        if len(runs) > 1:
            body.append(f'<tr class="group"><th colspan="{len(columns)}">{_run_mark(runs, run)}</th></tr>')
        body += [_stage_row(node, _anchor(runs, run)) for node in run.nodes]
    text = {"does", "from", "key", ""}
    heads = "".join(f'<th class="text">{name}</th>' if name in text else f"<th>{name}</th>" for name in columns)
    if not any(run.nodes for run in runs):
        return None
    return Section("stages", "Stage by stage", _table(f"<tr>{heads}</tr>", body))


def training(runs: Sequence[Run]) -> Section | None:
    """Losses over the tokens of all stages."""
    drawn = charts.training_curves(runs)
    if not drawn:
        return None
    note = (
        "Training loss over the tokens of all stages, end to end; rings are losses on held-out rows, as much of every "
        "source whatever its share in training. A stage's loss is its own objective's, so stages with different "
        "objectives are not comparable."
    )
    return Section("training", "Training", f'<p class="soft">{note}</p>{_figure(drawn)}')


def mixture(runs: Sequence[Run]) -> Section | None:
    """The shares of the sources over training, and their ledger."""
    drawn = [(run, charts.mixture_area(run)) for run in runs]
    parts = []
    for run, area in drawn:
        ledger = _ledger(run)
        if not area and not ledger:
            continue
        part = (_figure(area) if area else "") + ledger
        parts.append(part if len(runs) == 1 else f"<details><summary>{escape(run.name)}</summary>{part}</details>")
    if not parts:
        return None
    note = "Which source the consumed tokens came from, and the ledger at the end of each stage."
    return Section("mixture", "Mixture consumed", f'<p class="soft">{note}</p>{"".join(parts)}')


def evaluation(runs: Sequence[Run]) -> Section | None:
    """Metrics of every training stage, drawn and as a table."""
    names = charts.metric_names(runs)
    if not names:
        return None
    drawn = [
        charts.metric_lines(runs, ["perplexity/"], "perplexity"),
        charts.metric_lines(runs, ["tasks/"], "exact match"),
        charts.metric_lines(runs, ["preference/accuracy", "judge/win_rate", "reward/"], "preference"),
    ]
    figures = "".join(_figure(each) for each in drawn if each)
    groups = [[run] for run in runs] if len(runs) > 1 else [list(runs)]
    tables = [
        (f"<h3>{_run_mark(runs, run)}</h3>" if len(runs) > 1 else "") + _metric_table(run, names) for [run] in groups
    ]
    compared = _final_metrics(runs, names) if len(runs) > 1 else ""
    if len(runs) > 1:
        tables = [f"<details><summary>Stage by stage, for each run</summary>{''.join(tables)}</details>"]
    note = (
        "After each training stage, on rows that no stage has seen. The win rate is over the model that the stage "
        "started from, with its 95 % interval, on questions that not both got wrong: a wrong response has lost. What a "
        "reward model prefers is told by its scores, on the comparisons that its own data holds out."
    )
    return Section(
        "evaluation",
        "Evaluation",
        f'<p class="soft">{note}</p>{compared}{"".join(tables)}<div class="figures">{figures}</div>',
    )


def position(runs: Sequence[Run]) -> Section | None:
    """Loss over the tokens before, in the stage's own context."""
    drawn = charts.loss_by_position(runs)
    if not drawn:
        return None
    note = "Held-out loss of tokens by how many tokens stand before them, in windows of the stage's own context."
    return Section("position", "Loss by position", f'<p class="soft">{note}</p>{_figure(drawn)}')


def needle(runs: Sequence[Run]) -> Section | None:
    """Where in how long a text keys were found again, model by model."""
    found = [
        (stage.name if len(runs) == 1 else f"{run.name}: {stage.name}", grid)
        for run in runs
        for stage, grid in needle_grids(run)
    ]
    rows = [found[at : at + MAPS_IN_A_ROW] for at in range(0, len(found), MAPS_IN_A_ROW)]
    if not rows:
        return None
    note = (
        f"A key is hidden in held-out text, and the last line asks for it: the share of cases in which "
        f"{answers_said([grid for _, grid in found])}, by the text's length and by where in it the key stands; depth 0 "
        "is its beginning."
    )
    drawn = "".join(_figure(figure) for row in rows if (figure := needle_maps(row)))
    return Section("needle", "Needles in a haystack", f'<p class="soft">{note}</p>{drawn}')


def gates(runs: Sequence[Run]) -> Section | None:
    """What gates have asked of stages, and what they have found."""
    rows = [[*([run.name] if len(runs) > 1 else []), *cells] for run in runs for cells in gate_rows(run)]
    if not rows:
        return None
    note = "A run goes on from a stage with a gate where its evaluation has shown what is wanted; else it stops there."
    heads = [*(["run"] if len(runs) > 1 else []), *GATE_HEADS]
    return Section("gates", "Gates", f'<p class="soft">{note}</p>{_cells(Table(heads, rows))}')


def preference(runs: Sequence[Run]) -> Section | None:
    """Rewards and accuracies of preference training."""
    drawn = charts.preference_curves(runs)
    if not drawn:
        return None
    note = (
        "A reward is beta times the log-ratio of policy and reference, of a reward model its score; the margin is "
        "chosen less rejected."
    )
    return Section("preference", "Preference training", f'<p class="soft">{note}</p>{_figure(drawn)}')


def calibration(runs: Sequence[Run]) -> Section | None:
    """What reward models predict against what people chose, drawn and by strength."""
    found = [(run, stage, entries) for run in runs for stage, entries in calibrated.calibrations(run)]
    drawn = charts.calibration_curves(runs, found)
    if not drawn:
        return None
    parts = [_figure(drawn)]
    for run, stage, entries in found:
        name = stage.name if len(runs) == 1 else f"{run.name}: {stage.name}"
        parts += [f"<h3>{escape(name)}</h3>", _cells(calibrated.table(entries))]
    note = (
        "With which probability the response with the higher score is better, as the scores say, and how often people "
        "preferred it: a calibrated model lies on the diagonal, a timid one above. Held-out comparisons; a mark's size "
        "goes with their number. Below, by how much people found the chosen response better: how often it scores "
        "higher, the mean probability that it is better, and how far probabilities are from frequencies."
    )
    return Section("calibration", "Calibration of reward models", f'<p class="soft">{note}</p>{"".join(parts)}')


def live(runs: Sequence[Run]) -> Section | None:
    """Rewards and KL of the responses that a policy has drawn while it was trained."""
    drawn = charts.live_curves(runs)
    if not drawn:
        return None
    note = "What the judge gives the policy's own responses in the mean, and their log-ratio to the reference."
    return Section("live", "The policy's own responses", f'<p class="soft">{note}</p>{_figure(drawn)}')


def samples(runs: Sequence[Run]) -> Section | None:
    """What each model answered to the same questions."""
    parts = []
    for run in runs:
        for stage in run.models:
            node = run.evaluation(stage)
            found = node.files.get("samples.json") if node else None
            if not isinstance(found, list) or not found:
                continue
            name = stage.name if len(runs) == 1 else f"{run.name}: {stage.name}"
            is_open = " open" if len(runs) == 1 and stage is run.models[-1] else ""
            cards = "".join(_sample(sample) for sample in found if isinstance(sample, dict))
            parts.append(
                f'<details{is_open}><summary>{escape(name)}</summary><div class="samples">{cards}</div></details>'
            )
    if not parts:
        return None
    note = "The first held-out questions, answered after each stage."
    return Section("samples", "Samples", f'<p class="soft">{note}</p>{"".join(parts)}')


def selection(runs: Sequence[Run]) -> Section | None:
    """Whose responses were kept, by model, task and difficulty."""
    parts = []
    for run in runs:
        for node in selections(run):
            name = node.name if len(runs) == 1 else f"{run.name}: {node.name}"
            parts.append(f"<h3>{escape(name)}</h3>")
            parts += [_cells(table) for table in tables(node)]
    if not parts:
        return None
    note = (
        "All responses that were sampled, and those that were kept to be learnt from. A model is among the best of a "
        "prompt where nobody's response scores higher, and alone right where no other model has a right one."
    )
    return Section("selection", "Who won where", f'<p class="soft">{note}</p>{"".join(parts)}')


def settings(runs: Sequence[Run]) -> Section | None:
    """The scaled recipe, and the machine and versions of each run."""
    parts = []
    for run in runs:
        if run.recipe:
            name = "The scaled recipe" if len(runs) == 1 else f"{run.name}: the scaled recipe"
            parts.append(f"<details><summary>{escape(name)}</summary><pre>{escape(recipe_text(run))}</pre></details>")
    facts = [environment(run) for run in runs]
    rows = [
        f'<tr><th class="text">{escape(name)}</th>'
        + "".join(f'<td class="text">{escape(fact.get(name, NOTHING))}</td>' for fact in facts)
        + "</tr>"
        for name in dict.fromkeys(name for fact in facts for name in fact)
    ]
    if rows:
        heads = "".join(f'<th class="text">{escape(run.name)}</th>' for run in runs) if len(runs) > 1 else ""
        table = _table(f"<tr><th></th>{heads}</tr>" if heads else "", rows)
        parts.append(f"<details><summary>Environment</summary>{table}</details>")
    return Section("settings", "Settings", "".join(parts)) if parts else None


SECTIONS: tuple[Callable[[Sequence[Run]], Section | None], ...] = (
    graph, training, evaluation, calibration, selection, samples, preference, live, position, needle, gates, mixture,
    stages, settings,
)  # fmt: skip


# ---- facts that the Markdown tells too ----


def totals(run: Run) -> dict[str, str]:
    """Figures of a whole run."""
    made = [node for node in run.nodes if node.is_made]
    trained = [node for node in run.trained if node.is_made]
    spent = [node.seconds for node in made if node.seconds is not None and not node.reused]
    reused = [node.seconds or 0.0 for node in made if node.reused]
    parameters = [node.get("parameters") for node in run.trained if is_number(node.get("parameters"))]
    tokens = [node.get("tokens") for node in trained if is_number(node.get("tokens"))]
    operations = [(node.record or {}).get("flops") or 0 for node in made]
    return {
        "parameters": quantity(parameters[-1]) if parameters else NOTHING,
        "tokens trained": quantity(sum(tokens)) if tokens else NOTHING,
        "FLOPs": flops(sum(operations)),
        "time": duration(run.facts.get("seconds", sum(spent))),
        "stages": f"{len(made)} of {len(run.nodes)}" if len(made) < len(run.nodes) else str(len(made)),
        "reused": f"{len(reused)}, {duration(sum(reused))}" if reused else NOTHING,
    }


def date(run: Run) -> str | None:
    """When the last artifact was made, to the minute."""
    created = max((str((node.record or {}).get("created") or "") for node in run.nodes), default="")
    return created[:16].replace("T", " ") or None


def commit(run: Run) -> str | None:
    """The commit that made the last of the artifacts, if they name one."""
    states = [node.record["git"] for node in run.nodes if node.record and node.record.get("git")]
    if not states:
        return None
    dirty = any(state.get("dirty") for state in states)
    return f"commit {str(states[-1].get('commit'))[:8]}{' with changes' if dirty else ''}"


def state(node: Node) -> str:
    """Whether a node's artifact was made, reused, or is not there."""
    return "not made" if not node.is_made else "reused" if node.reused else "made"


def metric_value(results: dict[str, float], name: str) -> str:
    """A metric, with its interval where there is one."""
    value = measure(results.get(name))
    if f"{name}_low" in results:
        value += f" [{measure(results[f'{name}_low'])}, {measure(results[f'{name}_high'])}]"
    return value


# ---- parts ----


def _table(head: str, body: Iterable[str]) -> str:
    return f'<div class="table"><table><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'


def _cells(table: Table) -> str:
    """A table of plain cells, whose first column names a row."""
    heads = "".join(f"<th>{escape(head)}</th>" for head in table.heads)
    rows = (
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for first, *cells in table.rows
    )
    return _table(f"<tr>{heads}</tr>", rows)


def _figure(figure: dict[str, Any]) -> str:
    content = json.dumps(figure, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    height = figure["layout"]["height"]
    return (
        f'<div class="figure is-waiting" style="min-height:{height}px">'
        f'<script type="application/json">{content}</script><noscript>The drawing needs JavaScript.</noscript></div>'
    )


def _anchor(runs: Sequence[Run], run: Run) -> str:
    return "stage-" if len(runs) == 1 else f"stage-{_place(runs, run)}-"


def _place(runs: Sequence[Run], run: Run) -> int:
    return next(place for place, other in enumerate(runs) if other is run)


def _run_mark(runs: Sequence[Run], run: Run) -> str:
    """A run's name with the colour of its curves."""
    colour = charts.COLOURS[_place(runs, run) % len(charts.COLOURS)]
    return f'<span class="from-run" style="background:{colour}"></span>{escape(run.name)}'


def _stage_row(node: Node, anchor: str) -> str:
    does = node.get("objective") or ""
    kind = LABELS.get(node.kind, node.kind)
    key = str((node.record or {}).get("key") or "")
    is_training = node.kind == "train"
    goes_through_tokens = node.kind in ("train", "score")
    utilisation = node.get("flops_utilisation")
    cells = [
        ("text", escape(f"{kind}, {does}" if does else kind)),
        ("text", escape(str(node.planned.get("starts_from") or node.inputs.get("starts_from") or ""))),
        ("", quantity(node.get("tokens")) if goes_through_tokens else ""),
        ("", figure(node.get("steps")) if is_training else ""),
        ("", escape(_context(node)) if is_training else ""),
        ("", duration(node.seconds) if node.is_made else ""),
        ("", quantity(node.get("tokens_per_second")) if goes_through_tokens and node.is_made else ""),
        ("", f"{100 * utilisation:.0f} %" if is_training and is_number(utilisation) else ""),
        ("", size(node.bytes) if node.bytes else ""),
        ("text", f"<code title='{escape(key)}'>{escape(key[:10])}</code>" if key else ""),
        ("text", state(node)),
    ]
    classes = " ".join(name for name, holds in (("main", is_training), ("is-missing", not node.is_made)) if holds)
    row = "".join(f'<td class="{name}">{cell}</td>' if name else f"<td>{cell}</td>" for name, cell in cells)
    mark = f'<span class="dot kind-{escape(node.kind)}"></span>'
    return f'<tr id="{escape(anchor + node.name)}" class="{classes}"><th>{mark}{escape(node.name)}</th>{row}</tr>'


def _context(node: Node) -> str:
    """A context length, or the first and the last of a ramp."""
    ramp = node.planned.get("context") or ((node.record or {}).get("settings") or {}).get("context")
    values = [entry["value"] for entry in ramp] if isinstance(ramp, list) else [ramp]
    return " to ".join(figure(value) for value in dict.fromkeys((values[0], values[-1])))


def _ledger(run: Run) -> str:
    """Tokens consumed by source and stage."""
    trained = [node for node in run.trained if (node.record or {}).get("ledger")]
    sources = list(dict.fromkeys(source for node in trained for source in (node.record or {})["ledger"]))
    if not sources:
        return ""
    rows = []
    for source in sources:
        counts = [(node.record or {})["ledger"].get(source) for node in trained]
        cells = "".join(f"<td>{figure(count) if count else ''}</td>" for count in counts)
        rows.append(f"<tr><th>{escape(source)}</th>{cells}</tr>")
    heads = "".join(f"<th>{escape(node.name)}</th>" for node in trained)
    return _table(f"<tr><th>tokens from</th>{heads}</tr>", rows)


def _metric_table(run: Run, names: Sequence[str]) -> str:
    shown = run.evaluated
    heads = "".join(f"<th>{escape(stage.name)}</th>" for stage in shown)
    rows = []
    for name in names:
        results = [run.results(stage) for stage in shown]
        if any(name in result for result in results):
            cells = "".join(f"<td>{escape(metric_value(result, name))}</td>" for result in results)
            rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return _table(f"<tr><th></th>{heads}</tr>", rows)


def _final_metrics(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The last evaluation of each run, side by side."""
    last = [run.evaluated[-1] if run.evaluated else None for run in runs]
    heads = "".join(
        f"<th>{_run_mark(runs, run)}<br>{escape(stage.name if stage else NOTHING)}</th>"
        for run, stage in zip(runs, last, strict=True)
    )
    rows = []
    for name in names:
        results = [run.results(stage) if stage else {} for run, stage in zip(runs, last, strict=True)]
        cells = "".join(f"<td>{escape(metric_value(result, name))}</td>" for result in results)
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return _table(f"<tr><th>after its last stage</th>{heads}</tr>", rows)


def _side_by_side(runs: Sequence[Run]) -> str:
    columns = [
        {"recipe": run.title, "scale": str(run.scale or NOTHING), "seed": str(run.seed), "folder": run.folder_name}
        for run in runs
    ]
    for name, values in differences(runs).items():
        for facts, value in zip(columns, values, strict=True):
            facts.setdefault(name, value)
    for facts, run in zip(columns, runs, strict=True):
        facts |= totals(run) | {"date": date(run) or NOTHING}
    rows = []
    for name in dict.fromkeys(name for facts in columns for name in facts):
        values = [facts.get(name, NOTHING) for facts in columns]
        if any(value != NOTHING for value in values):
            cells = "".join(f'<td class="text">{escape(value)}</td>' for value in values)
            rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    heads = "".join(f'<th class="text">{_run_mark(runs, run)}</th>' for run in runs)
    return _table(f"<tr><th></th>{heads}</tr>", rows)


def _sample(sample: dict[str, Any]) -> str:
    """A conversation of the evaluation. All of it was written by a model or a data set: escaped."""

    def verdict(right: Any) -> str:
        return (
            "" if right is None else '<span class="right">right</span>' if right else '<span class="wrong">wrong</span>'
        )

    def said(label: str, text: Any, mark: str = "") -> str:
        return f"<dt>{label} {mark}</dt><dd><pre>{escape(visible(text))}</pre></dd>" if text is not None else ""

    won = {"win": "won", "loss": "lost", "tie": "tie", "both wrong": "both wrong"}.get(str(sample.get("verdict")), "")
    return (
        f'<article class="sample"><h4><span>{escape(str(sample.get("task", "")))}</span><span>{won}</span></h4><dl>'
        + said("question", sample.get("prompt"))
        + said("expected", sample.get("reference"))
        + said("response", sample.get("response"), verdict(sample.get("right")))
        + said("response of the model before", sample.get("starts_from"), verdict(sample.get("starts_from_right")))
        + "</dl></article>"
    )
