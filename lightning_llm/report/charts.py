"""What the page draws, as Plotly figures in plain dicts: data and axes here, colours of the surroundings in page.js."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import accumulate
from typing import Any

from lightning_llm.report.numbers import digits, is_number
from lightning_llm.report.record import Node, Run

Figure = dict[str, Any]
Trace = dict[str, Any]
COLOURS = ("#3f74b5", "#c8792b", "#3c938a", "#b5526b", "#7d65b0", "#6d8a35", "#8a6d5a", "#5d7285")  # on light and dark
PANEL = 0.055  # free height between two panels of one figure, as a share of all


def training_curves(runs: Sequence[Run]) -> Figure | None:
    """Loss with validation, learning rate and gradient norm over the tokens of all training stages, end to end."""
    panels = ["loss, nats", "learning rate", "gradient norm"]
    traces: list[Trace] = []
    for run, stage, offset, colour in _curves(runs):
        place = _legend(runs, run, stage.name)
        for axis, figure in enumerate(("loss", "lr", "grad_norm"), start=1):
            lines = [line for line in stage.training if is_number(line.get(figure))]
            if figure == "lr":  # its axis is logarithmic: the last step of a schedule that ends at 0 has no place on it
                lines = [line for line in lines if line["lr"] > 0]
            traces.append(_curve(lines, figure, offset, colour, axis) | place)
        checks = [line for line in stage.validation if is_number(line["validation/loss"])]
        rings = {"mode": "markers", "marker": _ring(colour)}
        traces.append(_curve(checks, "validation/loss", offset, colour, axis=1) | place | rings)
    traces = [trace for trace in traces if trace["x"]]
    if not traces:
        return None
    layout = _stacked(panels, [0.56, 0.22, 0.22], _end(traces)) | _stage_bands(runs)
    layout["yaxis2"] |= {"type": "log", "exponentformat": "e", "dtick": 1}
    return _figure(traces, layout, 620)


def mixture_area(run: Run) -> Figure | None:
    """Share of each source in what was consumed between two lines of the metrics, stacked to 100 %, over tokens."""
    sources: dict[str, tuple[list[float], list[float]]] = {}  # name -> tokens, share
    for _, stage, offset, _ in _curves([run]):
        before: dict[str, float] = {}
        previous = offset
        for line in stage.training:
            after = line.get("consumed") or {}
            steps = {name: tokens - before.get(name, 0) for name, tokens in after.items()}
            total = sum(steps.values())
            for name in dict.fromkeys([*sources, *steps]):
                x, y = sources.setdefault(name, ([], []))
                share = 100 * steps.get(name, 0) / total if total else 0.0
                x += [previous, offset + line["tokens"]]
                y += [share, share]
            before, previous = after, offset + line["tokens"]
    if not sources:
        return None
    begin = {min(x) for x, _ in sources.values()}
    traces = []
    for index, (name, (x, y)) in enumerate(sources.items()):
        lead = [min(begin), x[0]] if x[0] > min(begin) else []  # a source that comes later was at nought until then
        colour = COLOURS[index % len(COLOURS)]
        traces.append(
            {
                "type": "scatter",
                "name": escape(name, quote=False),
                "x": lead + x,
                "y": [0.0] * len(lead) + [digits(value) for value in y],
                "stackgroup": "sources",
                "legendgroup": name,
                "mode": "lines",
                "line": {"width": 0, "color": colour},
                "fillcolor": colour,
                "hovertemplate": "%{y:.1f} %",
            }
        )
    layout = _axes("tokens", "share of the tokens, %") | _stage_bands([run])
    layout["yaxis"] |= {"range": [0, 100]}
    return _figure(traces, layout | {"hovermode": "x unified"}, 360)


def metric_lines(runs: Sequence[Run], prefixes: Sequence[str], title: str) -> Figure | None:
    """Metrics of the evaluations whose name starts with one of `prefixes`, stage by stage."""
    traces = []
    for index, run in enumerate(runs):
        names = _metric_names([run], prefixes)
        for number, name in enumerate(names):
            points = [(stage.name, run.results(stage).get(name)) for stage in run.models]
            points = [(stage, value) for stage, value in points if is_number(value)]
            colour = COLOURS[(index if len(runs) > 1 else number) % len(COLOURS)]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    **_legend(runs, run, _last_part(name)),
                    "x": [stage for stage, _ in points],
                    "y": [digits(value) for _, value in points],
                    "line": {"color": colour, "width": 2},
                    "marker": {"symbol": _symbol(number if len(runs) > 1 else 0), "size": 8},
                    "error_y": _interval(run, name, [stage for stage, _ in points]),
                }
            )
    if not traces:
        return None
    layout = _axes("", title)
    layout["xaxis"] |= {"type": "category", "categoryarray": _stage_names(runs), "categoryorder": "array"}
    layout["yaxis"] |= {"rangemode": "tozero"}
    return _figure(traces, layout, 340 + 24 * (len(runs) - 1))


def loss_by_position(runs: Sequence[Run]) -> Figure | None:
    """Held-out loss of the tokens at each range of positions, at the stage's own context, for every training stage."""
    traces = []
    for index, run in enumerate(runs):
        for number, stage in enumerate(run.trained):
            node = run.evaluation(stage)
            curve = node.files.get("loss_by_position.json") if node else None
            if not curve or not curve.get("loss"):
                continue
            colour = COLOURS[(index if len(runs) > 1 else number) % len(COLOURS)]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    **_legend(runs, run, stage.name),
                    "x": [(a + b - 1) / 2 for a, b in zip(curve["begin"], curve["end"], strict=True)],
                    "y": [digits(value) for value in curve["loss"]],
                    "line": {"color": colour, "width": 2, "dash": _dash(number if len(runs) > 1 else 0)},
                    "marker": {"size": 6},
                }
            )
    if not traces:
        return None
    layout = _axes("position in the context, tokens", "loss, nats")
    longest = max(x for trace in traces for x in trace["x"])
    layout["xaxis"] |= {"type": "log", "tickvals": [2**k for k in range(int(longest).bit_length() + 1)]}
    return _figure(traces, layout, 360)


def preference_curves(runs: Sequence[Run]) -> Figure | None:
    """Rewards and accuracies of preference stages over their tokens."""
    axes = (("rewards/chosen", 1), ("rewards/rejected", 1), ("rewards/margins", 1), ("rewards/accuracies", 2))
    shown = [(metric, _last_part(metric), axis) for metric, axis in axes]
    drawn = _curves_of_stages(runs, has_rewards, shown, ["reward, nats", "accuracy"])
    if drawn:
        drawn["layout"]["yaxis2"] |= {"range": [0, 1.03]}
    return drawn


def live_curves(runs: Sequence[Run]) -> Figure | None:
    """What the judge says of the policy's own responses, and how far the policy has gone, over the stages' tokens."""
    shown = (("reward/mean", "reward", 1), ("kl/reference", "KL", 2))
    return _curves_of_stages(runs, is_live, shown, ["mean reward", "KL, nats"])


def _curves_of_stages(
    runs: Sequence[Run], wanted: Callable[[Node], bool], shown: Sequence[tuple[str, str, int]], titles: list[str]
) -> Figure | None:
    """Curves of all stages that are wanted, in two diagrams with one axis of tokens.

    Args:
        shown: figures, what each is called, and in which of the two it is.
    """
    traces = []
    stages = [(run, stage) for run in runs for stage in run.trained if wanted(stage)]
    for index, (run, stage) in enumerate(stages):
        for number, (metric, label, axis) in enumerate(shown):
            lines = [line for line in stage.training if is_number(line.get(metric))]
            colour = COLOURS[(index if len(stages) > 1 else number) % len(COLOURS)]
            name = label if len(stages) <= len(runs) else f"{stage.name}: {label}"
            trace = _curve(lines, metric, 0, colour, axis) | _legend(runs, run, name)
            trace["line"] |= {"dash": _dash(number if len(stages) > 1 else 0)}
            traces.append(trace)
    return _figure(traces, _stacked(titles, [0.62, 0.38], _end(traces)), 460) if traces else None


def calibration_curves(runs: Sequence[Run], found: Sequence[tuple[Run, Node, list[dict[str, Any]]]]) -> Figure | None:
    """Frequency over predicted probability for each reward model, and the diagonal where both agree.

    Args:
        found: reward models with the entries of their calibration.json, the first of which is of all pairs.
    """
    traces = []
    for index, (run, stage, entries) in enumerate(found):
        bins = entries[0].get("bins") or []
        most = max((each["pairs"] for each in bins), default=1)
        colour = COLOURS[index % len(COLOURS)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                **_legend(runs, run, stage.name),
                "x": [digits(each["predicted"]) for each in bins],
                "y": [digits(each["frequency"]) for each in bins],
                "line": {"color": colour, "width": 2},
                "marker": {"size": [round(6 + 10 * (each["pairs"] / most) ** 0.5, 1) for each in bins]},
            }
        )
    traces = [trace for trace in traces if trace["x"]]
    if not traces:
        return None
    layout = _axes("predicted probability", "frequency")
    layout["xaxis"] |= {"range": [0.48, 1.02]}
    line = {"width": 1, "dash": "dot", "color": "#8b919c"}
    layout["shapes"] = [{"type": "line", "x0": 0.5, "y0": 0.5, "x1": 1, "y1": 1, "line": line}]
    return _figure(traces, layout, 380)


def has_rewards(stage: Node) -> bool:
    """Whether a stage logged rewards, as preference training does."""
    return any("rewards/margins" in line for line in stage.training)


def is_live(stage: Node) -> bool:
    """Whether a stage learns from its own policy's responses."""
    return any("responses/length" in line for line in stage.training)


def metric_names(runs: Sequence[Run]) -> list[str]:
    """All metrics of the evaluations, in the order in which they were first written."""
    return _metric_names(runs, ("",))


# ---- parts ----


def _metric_names(runs: Iterable[Run], prefixes: Sequence[str]) -> list[str]:
    names: dict[str, None] = {}
    for run in runs:
        for stage in run.evaluated:
            found = [name for name, value in run.results(stage).items() if is_number(value)]
            names |= dict.fromkeys(name for name in found if name.startswith(tuple(prefixes)))
    return [name for name in names if not (name.endswith(("_low", "_high")) and name.rpartition("_")[0] in names)]


def _stage_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(stage.name for run in runs for stage in run.models))


def offsets(run: Run) -> dict[str, float]:
    """Tokens trained before each training stage, in the order of the plan."""
    lengths = [max((line["tokens"] for line in stage.curves), default=0) for stage in run.trained]
    return dict(zip((stage.name for stage in run.trained), accumulate(lengths, initial=0.0), strict=False))


def _curves(runs: Sequence[Run]) -> Iterable[tuple[Run, Node, float, str]]:
    """Each training stage with curves, the tokens before it, and its colour: the stage's, or the run's if several."""
    for index, run in enumerate(runs):
        before = offsets(run)
        for number, stage in enumerate(run.trained):
            if stage.curves:
                yield run, stage, before[stage.name], COLOURS[(index if len(runs) > 1 else number) % len(COLOURS)]


def _curve(lines: list[dict[str, Any]], figure: str, offset: float, colour: str, axis: int) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines",
        "hovertemplate": "%{y:.4g} after %{x:,.0f} tokens",
        "x": [offset + line["tokens"] for line in lines],
        "y": [digits(line[figure]) for line in lines],
        "yaxis": "y" if axis == 1 else f"y{axis}",
        "line": {"color": colour, "width": 1.6},
    }


def _legend(runs: Sequence[Run], run: Run, name: str) -> dict[str, Any]:
    """A trace's place in the legend: its own, or its run's where there are several; then the pointer tells the rest."""
    name, group = escape(name, quote=False), escape(run.name, quote=False)
    if len(runs) == 1:
        return {"name": name, "legendgroup": name}
    return {"name": group, "legendgroup": group, "hovertemplate": f"%{{y:.4g}}<extra>{group}: {name}</extra>"}


def _figure(traces: list[Trace], layout: Figure, height: int) -> Figure:
    """The figure; each group of traces has one entry in the legend."""
    first = {trace["legendgroup"]: index for index, trace in reversed(list(enumerate(traces)))}
    entries = set(first.values())
    shown = [trace | {"showlegend": index in entries} for index, trace in enumerate(traces)]
    return {"data": shown, "layout": layout | {"height": height}}


def _ring(colour: str) -> dict[str, Any]:
    return {"symbol": "circle-open", "size": 7, "color": colour, "line": {"width": 2}}


def _interval(run: Run, name: str, stages: list[str]) -> dict[str, Any]:
    """Error bars where the evaluation gives an interval."""
    results = [run.results(run.by_name[stage]) for stage in stages]
    if not any(f"{name}_low" in result for result in results):
        return {"visible": False}
    return {
        "type": "data",
        "symmetric": False,
        "array": [digits(result.get(f"{name}_high", result[name]) - result[name]) for result in results],
        "arrayminus": [digits(result[name] - result.get(f"{name}_low", result[name])) for result in results],
        "thickness": 1.5,
        "width": 5,
    }


def _axes(x: str, y: str) -> Figure:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}


def _end(traces: list[Trace]) -> float:
    return max((x for trace in traces for x in trace["x"]), default=0)


def _stacked(titles: list[str], shares: list[float], end: float) -> Figure:
    """Panels one above the other over one axis of tokens, from 0 to `end`."""
    range_ = [-0.008 * end, 1.008 * end]  # room for half a marker
    layout: Figure = {"xaxis": {"title": {"text": "tokens"}, "anchor": f"y{len(titles)}", "range": range_}}
    free, top = 1 - PANEL * (len(titles) - 1), 1.0
    for number, (title, share) in enumerate(zip(titles, shares, strict=True), start=1):
        bottom = max(top - share * free, 0.0)
        key = "yaxis" if number == 1 else f"yaxis{number}"
        layout[key] = {"title": {"text": title}, "domain": [round(bottom, 4), round(top, 4)]}
        top = bottom - PANEL
    return layout


def _stage_bands(runs: Sequence[Run]) -> Figure:
    """Names of the stages over the panels and lines between them, if all runs have the same ones at the same tokens."""
    bounds = [offsets(run) for run in runs]
    if any(bound != bounds[0] for bound in bounds):
        return {}
    run = runs[0]
    shown = [stage for stage in run.trained if stage.curves]
    starts = [bounds[0][stage.name] for stage in shown]
    ends = [start + max(line["tokens"] for line in stage.curves) for start, stage in zip(starts, shown, strict=True)]
    return {
        "shapes": [_upright(start) for start in starts[1:]],
        "annotations": [
            _label(stage.name, (start + end) / 2) for stage, start, end in zip(shown, starts, ends, strict=True)
        ],
    }


def _upright(x: float) -> Figure:
    line = {"width": 1, "dash": "dot", "color": "#8b919c"}
    return {"type": "line", "xref": "x", "yref": "paper", "x0": x, "x1": x, "y0": 0, "y1": 1, "line": line}


def _label(text: str, x: float) -> Figure:
    place = {"xref": "x", "yref": "paper", "x": x, "y": 1, "yanchor": "bottom", "showarrow": False}
    return {"text": escape(text, quote=False), **place}


def _symbol(number: int) -> str:
    return ("circle", "square", "diamond", "triangle-up", "cross", "x")[number % 6]


def _dash(number: int) -> str:
    return ("solid", "dot", "dash", "dashdot")[number % 4]


def _last_part(metric: str) -> str:
    """`perplexity/web` is `web` where the axis says perplexity."""
    return metric.rpartition("/")[2].replace("_", " ")
