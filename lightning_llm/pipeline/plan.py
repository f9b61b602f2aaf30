"""What a run will do, in figures: steps, parameters, FLOPs, memory, disk and time of every node. Touches no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_llm.data.places import missing_place
from lightning_llm.models.config import ModelConfig
from lightning_llm.models.family import check_family
from lightning_llm.models.size import (
    ScoreHead,
    forward_flops_per_token,
    parameter_counts,
    recomputed_flops_per_token,
    training_flops_per_token,
)
from lightning_llm.pipeline.checks import check
from lightning_llm.pipeline.examples import estimated_lengths
from lightning_llm.pipeline.expand import Node, expand
from lightning_llm.pipeline.frozen import (
    GIB,
    evaluate_figures,
    evaluate_rewards_figures,
    generate_figures,
    head_of,
    held_frozen,
    judge_figures,
    merge_figures,
    score_bytes,
)
from lightning_llm.pipeline.kernels import REMADE, made_models, refused_attention, shape_of
from lightning_llm.pipeline.live import live_figures
from lightning_llm.pipeline.names import name_nearest
from lightning_llm.pipeline.order import ancestors, trained_behind
from lightning_llm.pipeline.recipe import Recipe
from lightning_llm.pipeline.remade import remade_figures
from lightning_llm.pipeline.scaling import scaled
from lightning_llm.schedules import BatchPlan, Ramp, learning_rate, ramp_value
from lightning_llm.settings import UserError
from lightning_llm.stages.config import (
    ComputeConfig,
    EvaluateRewardsSettings,
    PrepareSettings,
    TeacherSettings,
    TokenizerSettings,
    TrainSettings,
    TrainStage,
)

PREPARED_PER_SECOND = 1e6  # tokens; `tokenizers` makes some 4 MB of text a second
BYTES_PER_TRAINED_PARAMETER = 8  # weights and gradients, both in fp32 whatever the products are in
SHARED = ("tokenizer", "evaluation")  # nodes that belong to no stage


@dataclass(frozen=True)
class Plan:
    """The nodes in the order in which they run; printing it shows the table."""

    recipe: Recipe  # scaled
    nodes: tuple[Node, ...]
    notes: tuple[str, ...] = ()  # what would stop a run on this machine, what is an estimate

    @property
    def flops(self) -> float:
        """Of the models: what utilisation is reckoned by."""
        return sum(node.figures["flops"] for node in self.nodes)

    @property
    def hardware_flops(self) -> float:
        """What the devices compute: `flops`, and those of layers that run again in the backward pass."""
        return sum(node.figures["hardware_flops"] for node in self.nodes)

    @property
    def seconds(self) -> float:
        """Estimated, of all nodes one after the other on this compute."""
        return sum(node.figures["seconds"] for node in self.nodes)

    @property
    def disk_gib(self) -> float:
        """Of all artifacts, in GiB."""
        return sum(node.figures["disk_gib"] for node in self.nodes)

    def selected(self, *, until: str | None = None, only: str | None = None) -> Plan:
        """The part that a selector names: a stage with its inserted nodes, and for `until` all stages before it.

        Raises:
            UserError: both are given, or there is no such stage.
        """
        if until is not None and only is not None:
            raise UserError("until and only", "are both given", "Give one of them")
        if until is None and only is None:
            return self
        name = self.checked_stage("until" if only is None else "only", until or only or "")
        wanted = {name} if until is None else ancestors(name, self.recipe.stages)
        kept = [node for node in self.nodes if node.stage in wanted]
        needed = {source for node in kept for source in node.inputs.values()}
        nodes = [node for node in self.nodes if node in kept or (node.stage in SHARED and node.name in needed)]
        return Plan(self.recipe, tuple(nodes), _notes(self.recipe, nodes, made_models(self.nodes)))

    def checked_stage(self, selector: str, name: str) -> str:
        """`name`, if it is a stage."""
        if name not in self.recipe.stages:
            raise UserError(selector, f"there is no stage {name}", name_nearest(name, list(self.recipe.stages)))
        return name

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        recipe = self.recipe
        stages = [{"name": node.name, "kind": node.kind, "inputs": node.inputs, **node.figures} for node in self.nodes]
        return {
            "recipe": recipe.name,
            "scale": recipe.scale.name,
            "seed": recipe.seed,
            "model": recipe.model.name,
            "compute": recipe.compute.name,
            "flops": self.flops,
            "hardware_flops": self.hardware_flops,
            "seconds": self.seconds,
            "disk_gib": self.disk_gib,
            "notes": list(self.notes),
            "stages": stages,
        }

    def __str__(self) -> str:
        recipe, compute = self.recipe, self.recipe.compute
        sizes = parameter_counts(recipe.model)
        active = f", {_short(sizes['active'])} active" if sizes["active"] != sizes["total"] else ""
        head = (
            f"{recipe.name} at scale {recipe.scale.name}, seed {recipe.seed}: {recipe.model.name} "
            f"({_short(sizes['total'])} parameters{active}) on {compute.devices} x {compute.name}, {compute.precision}"
        )
        rows = [[title for title, _ in COLUMNS], *([show(node) for _, show in COLUMNS] for node in self.nodes)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = ["  ".join(_aligned(cell, i, widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows]
        again = self.hardware_flops - self.flops
        flops = f"{_short(self.flops)} FLOPs" + (f" (and {_short(again)} again in backward passes)" if again else "")
        total = f"total: {flops}, {_gib(self.disk_gib)} on disk, about {duration(self.seconds)}"
        tight = [node.name for node in self.nodes if node.figures["memory_gib"] > compute.memory_gib]
        memory = [f"{', '.join(tight)}: more than the {compute.memory_gib:g} GiB of a device"] if tight else []
        return "\n".join([head, "", *lines, "", total, *memory, *self.notes])

    __repr__ = __str__  # a notebook shows the table


def plan(recipe: Recipe) -> Plan:
    """Scale and expand a recipe, and reckon what it costs.

    Raises:
        UserError: the recipe cannot be run at its scale, or no file of the family has room for its model.
    """
    if not recipe.is_scaled:
        check(recipe)  # `compose` has; a recipe that was changed in Python since then is as good as its parts
    recipe = scaled(recipe)
    for model in [recipe.model, *(stage.model for stage in recipe.stages.values() if isinstance(stage, TrainStage))]:
        if model is not None:
            check_family(model)
    nodes = {node.name: node for node in expand(recipe)}
    models = made_models(nodes.values())
    planned: list[Node] = []
    for node in nodes.values():
        figures = _figures(recipe, node, nodes, models)
        if any((node.kind, node.settings, node.inputs) == (n.kind, n.settings, n.inputs) for n in planned):
            figures |= {"disk_gib": 0.0, "seconds": 0.0}  # one artifact, made once
        planned.append(replace(node, figures=figures))
    return Plan(recipe, tuple(planned), _notes(recipe, planned, models))


def _notes(recipe: Recipe, nodes: Sequence[Node], models: dict[str, ModelConfig]) -> tuple[str, ...]:
    return (
        *missing_sources(nodes),
        *refused_attention(recipe.compute, nodes, models),
        *estimated_lengths(recipe, {node.name for node in nodes}),
        *teachers_alone(recipe.compute, nodes),
        *drawn_otherwise(nodes),
    )


def teachers_alone(compute: ComputeConfig, nodes: Sequence[Node]) -> tuple[str, ...]:
    """A line about teachers that are asked before training, where training has more devices than they."""
    asked = [node.name for node in nodes if isinstance(node.settings, TeacherSettings)]
    if compute.devices == 1 or not asked:
        return ()
    return (f"{', '.join(asked)}: on one of the {compute.devices} devices, and so is its time",)


def drawn_otherwise(nodes: Iterable[Node]) -> tuple[str, ...]:
    """A line about policy gradients whose responses come from another distribution than the policy's."""
    names: dict[str, list[str]] = {}
    for node in nodes:
        if isinstance(node.settings, TrainSettings) and (line := node.settings.draws_otherwise):
            names.setdefault(line, []).append(node.name)
    return tuple(f"{', '.join(found)}: {line}" for line, found in names.items())


def missing_sources(nodes: Iterable[Node]) -> tuple[str, ...]:
    """A line for each path of the user's data that leads to nothing here. A plan may be drawn on another machine."""
    lines: dict[str, None] = {}  # in order, without repetition
    for node in nodes:
        if isinstance(node.settings, PrepareSettings):
            sources = node.settings.data.sources
        elif isinstance(node.settings, TokenizerSettings):
            sources = node.settings.tokenizer.sources
        else:
            continue
        for name, source in sources.items():
            if missing_place(source.path):
                lines[f"{node.name}: there is no {source.path} here, the source {name}; a run would refuse it"] = None
    return tuple(lines)


# ---- figures ----


def _figures(recipe: Recipe, node: Node, nodes: dict[str, Node], models: dict[str, ModelConfig]) -> dict[str, Any]:
    """What the plan says about a node: the same names for all, None or 0 where there is nothing to say."""
    compute = recipe.compute
    empty = {name: None for name in ("objective", "starts_from", "tokens", "steps", "context", "batch_tokens", "lr")}
    costs = {"parameters": None, "flops": 0.0, "memory_gib": 0.0, "disk_gib": 0.0, "seconds": 0.0}
    if node.kind == "train":
        found = _train_figures(recipe, node, models)
    elif node.kind == "score":
        model = shape_of(node.inputs["model"], models)
        stage = nodes[node.stage].settings
        tokens = _prepared_tokens(recipe, node.stage, stage)
        found = {
            "starts_from": node.inputs["model"],
            "tokens": tokens,
            "context": node.settings.context,
            "flops": tokens
            * forward_flops_per_token(model, _segment_length(recipe, node.stage, node.settings.context)),
            **held_frozen(model),
            "disk_gib": score_bytes(node.settings, model) * tokens / GIB,
        }
    elif node.kind == "generate":
        found = generate_figures(recipe, node, models)
    elif node.kind == "judge":
        found = judge_figures(recipe, node, nodes, models)
    elif node.kind == "merge":
        found = merge_figures(recipe, node, nodes, models)
    elif node.kind in REMADE:
        found = remade_figures(node, shape_of(node.inputs["starts_from"], models), models[node.name])
    elif node.kind == "select":
        found = {"starts_from": ", ".join(recipe.stages[node.name].data)}  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(node.settings, EvaluateRewardsSettings):
        behind = trained_behind(node.stage, recipe.stages)
        assert behind is not None, "otherwise nobody knows its data"
        example = _trained(recipe, behind).data.tokens_per_example
        found = evaluate_rewards_figures(node, nodes[behind].settings, example)
    elif node.kind == "gate":
        found = {"starts_from": node.inputs["evaluation"]}
    elif node.kind == "evaluate":
        found = evaluate_figures(recipe, node, models)
    elif isinstance(node.settings, PrepareSettings):
        tokens = None
        if node.stage in recipe.stages and node.stage in nodes and node.name.endswith(".prepare"):
            user = nodes[node.stage].settings
            if isinstance(user, TrainSettings) and user.rollout is None:
                tokens = _prepared_tokens(recipe, node.stage, user)
        width = 2 if recipe.model.vocab_size <= 2**16 else 4
        found = {
            "tokens": tokens,
            "disk_gib": width * (tokens or 0) / GIB,
            "seconds": (tokens or 0) / PREPARED_PER_SECOND,
        }
    else:
        found = {}
    figures: dict[str, Any] = empty | costs | found
    figures.setdefault("hardware_flops", figures["flops"])
    sampled = figures.pop("sampled_flops", figures["flops"] if node.kind == "generate" else 0.0)
    if figures["flops"]:
        at_best = compute.flops_per_second * (compute.devices if node.kind == "train" else 1)
        others = figures["hardware_flops"] - sampled
        figures["seconds"] = (sampled / compute.generation_efficiency + others / compute.efficiency) / at_best
    return figures


def _train_figures(recipe: Recipe, node: Node, models: dict[str, ModelConfig]) -> dict[str, Any]:
    settings: TrainSettings = node.settings
    batches = BatchPlan(settings.batch_tokens, settings.tokens)
    counts = parameter_counts(settings.model, head_of(settings.objective))
    flops, again = _flops(recipe, node.name, settings, training_flops_per_token), 0.0
    if recipe.compute.activation_checkpointing == "full":
        again = _flops(recipe, node.name, settings, recomputed_flops_per_token)
    stage, live = _trained(recipe, node.name), {}
    teacher_bytes = 0
    if (source := node.inputs.get("teacher_model")) is not None:  # asked in every step
        teacher = shape_of(source, models)
        teacher_bytes = 4 * parameter_counts(teacher)["total"]
        flops += _flops(recipe, node.name, replace(settings, model=teacher), forward_flops_per_token)
    if stage.rollout is not None:
        length = _segment_length(recipe, node.name, settings.context[0]["value"])
        live = live_figures(stage, node, settings.model, models, length)
        again *= live["learnt"]
        flops = live["learnt"] * flops + live["sampled_flops"] + live["scored_flops"]
    return {
        "objective": settings.objective.name,
        "starts_from": node.inputs.get("starts_from"),
        "tokens": settings.tokens,
        "steps": batches.steps,
        "context": _single(settings.context),
        "batch_tokens": _single(settings.batch_tokens),
        "lr": {
            "schedule": settings.lr.schedule,
            "peak": settings.lr.peak,
            "final": learning_rate(settings.lr, settings.tokens, settings.tokens),  # of a stretched one: where it stops
            "warmup_tokens": settings.lr.warmup_tokens,
        },
        "parameters": counts["total"],
        "flops": flops,
        "hardware_flops": flops + again,
        "memory_gib": (
            BYTES_PER_TRAINED_PARAMETER * counts["total"]
            + settings.optimizer.state_bytes(counts["total"], counts["matrices"])
            + settings.optimizer.online_merging.bytes_of_state * counts["total"]
            + (4 * counts["total"] if settings.averaging else 0)
            + _activation_bytes(recipe, settings)
            + teacher_bytes
            + live.get("memory_bytes", 0)
        )
        / GIB,
        # last weights beside their average
        "disk_gib": ((8 if settings.averaging else 4) * counts["total"] + live.get("disk_bytes", 0)) / GIB,
        "sampled_flops": live.get("sampled_flops", 0.0),
    }


def _trained(recipe: Recipe, name: str) -> TrainStage:
    stage = recipe.stages[name]
    assert isinstance(stage, TrainStage), f"{name} trains"
    return stage


def _segment_length(recipe: Recipe, name: str, context: int) -> int:
    """How long the segments of a stage are: documents fill the context, conversations and pairs are what they are."""
    data = _trained(recipe, name).data
    return context if data.form == "text" else min(round(data.tokens_per_example or context), context)


def _flops(
    recipe: Recipe,
    name: str,
    settings: TrainSettings,
    per_token: Callable[[ModelConfig, int, ScoreHead | None], float],
) -> float:
    """Over the pieces of the context ramp.

    Args:
        per_token: FLOPs of a token, given the model, the length of a segment and the model's head.
    """
    head = head_of(settings.objective)
    total, ends = 0.0, [entry["at"] for entry in settings.context[1:]] + [settings.tokens]
    for entry, end in zip(settings.context, ends, strict=True):
        tokens = max(min(end, settings.tokens) - entry["at"], 0)
        total += tokens * per_token(settings.model, _segment_length(recipe, name, entry["value"]), head)
    return total


def _activation_bytes(recipe: Recipe, settings: TrainSettings) -> float:
    """What one micro-batch keeps for the backward pass. A rule of thumb: the inputs of every product and norm."""
    model = settings.model
    wide = model.intermediate_size
    if model.num_experts:
        wide = model.num_experts_per_tok * model.moe_intermediate_size + model.shared_expert_intermediate_size
        wide += model.num_experts_per_tok * model.hidden_size // 4  # a token's copies, one for each of its experts
    heads = (model.num_attention_heads + model.num_key_value_heads) * model.head_size
    layer, layers = 8 * model.hidden_size + 4 * heads + 4 * wide, model.num_hidden_layers
    per_token = layers * layer
    if recipe.compute.activation_checkpointing == "full":  # every layer's input, and the one that is run again
        per_token = layers * model.hidden_size + layer
    longest = max(entry["value"] for entry in settings.context)
    tokens = min(max(recipe.compute.micro_batch_tokens, longest), ramp_value(settings.batch_tokens, settings.tokens))
    return (2 if settings.precision == "bf16" else 4) * per_token * tokens


def _prepared_tokens(recipe: Recipe, name: str, settings: TrainSettings) -> int:
    """Tokens that a stage reads, each once. Text may be there in plenty: what is not consumed is not counted."""
    return round(settings.tokens / max(_trained(recipe, name).epochs, 1.0))


def _single(ramp: Ramp) -> Any:
    return ramp[0]["value"] if len(ramp) == 1 else ramp


# ---- text ----


def _aligned(cell: str, column: int, width: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)


def _short(value: float | None) -> str:
    """1.2M, 7.62B, 6.7T; powers of ten beyond."""
    if value is None:
        return ""
    if value >= 1e15:
        return f"{value:.2e}".replace("e+", "e")
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            scale = 1e3 if letter == "k" else size
            return f"{value / scale:.3g}{letter}" if value / scale < 999.5 else f"{value / scale:.0f}{letter}"
    return f"{value:g}"


def _parameters(figures: dict[str, Any]) -> str:
    """With those that a token meets, where a stage makes a mixture of experts."""
    total, active = figures["parameters"], figures.get("active")
    return _short(total) + (f" ({_short(active)} active)" if active not in (None, total) else "")


def _ramp_text(value: Any) -> str:
    if isinstance(value, list):
        return " -> ".join(_short(entry["value"]) for entry in value)
    return f"{value:,}" if isinstance(value, int) and value < 1e6 else _short(value)


def _lr_text(lr: dict[str, Any] | None) -> str:
    return "" if lr is None else f"{lr['peak']:.2g} {lr['schedule']} {lr['final']:.2g}"


def _gib(value: float) -> str:
    if not value:
        return ""
    return f"{value * 1024:.1f} MiB" if value < 1 else f"{value:,.1f} GiB"


def duration(seconds: float) -> str:
    """41 s, 12 min, 3.1 h, 12 days, 300 years."""
    for size, unit in ((3600 * 24 * 365, "years"), (3600 * 24, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}" if seconds / size < 10 else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


COLUMNS = (
    ("stage", lambda node: node.name),
    ("kind", lambda node: node.figures["objective"] or node.kind),
    ("starts from", lambda node: node.figures["starts_from"] or ""),
    ("tokens", lambda node: _short(node.figures["tokens"])),
    ("steps", lambda node: "" if node.figures["steps"] is None else f"{node.figures['steps']:,}"),
    ("context", lambda node: _ramp_text(node.figures["context"])),
    ("batch", lambda node: _ramp_text(node.figures["batch_tokens"])),
    ("learning rate", lambda node: _lr_text(node.figures["lr"])),
    ("params", lambda node: _parameters(node.figures)),
    ("FLOPs", lambda node: _short(node.figures["flops"] or None)),
    ("memory", lambda node: _gib(node.figures["memory_gib"])),
    ("disk", lambda node: _gib(node.figures["disk_gib"])),
    ("time", lambda node: duration(seconds) if (seconds := node.figures["seconds"]) >= 0.5 else ""),
)
