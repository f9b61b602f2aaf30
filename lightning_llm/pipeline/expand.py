"""The visible graph: every stage of a scaled recipe with the nodes it needs, all their settings resolved.

    tokenizer            prepare   the one tokenizer of all stages that start from random weights
    evaluation.prepare   prepare   held-out rows that all evaluations share
    <stage>.prepare      prepare   its data as tokens
    <stage>.reference    score     log-probabilities under the model it starts from, for preferences that are there
    <stage>.teacher      score     what the model that it learns from expects in the place of every token
    <stage>              train, generate, ...: what the recipe says
    <stage>.evaluate     evaluate  on rows that all evaluations share; of a reward model on what its own data holds out
    <stage>.gate         gate      whether that is good enough to go on

A stage that starts from a model of elsewhere, or learns from one with random weights of its own, brings that model's
tokenizer: `<stage>.tokenizer`, and with it `<stage>.evaluation`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lightning_llm.data.config import STAGE, DataConfig, SourceConfig, TokenizerConfig
from lightning_llm.data.embedded.options import fewest_questions
from lightning_llm.data.places import is_of_stage, is_prepared
from lightning_llm.evaluation.config import EvaluationConfig
from lightning_llm.models.config import SIZES
from lightning_llm.objectives.config import DistillationConfig
from lightning_llm.optimization.config import LearningRateConfig, OptimizerConfig
from lightning_llm.pipeline.judged import judge_that_only_ranks
from lightning_llm.pipeline.lineage import Lineage
from lightning_llm.pipeline.order import before_gates, order_of_stages, trained_behind
from lightning_llm.pipeline.recipe import Recipe
from lightning_llm.pipeline.remade import masks_of, refuse_masks_of_another_size, shape_left, units_of_masks
from lightning_llm.pipeline.scaling import length_in_tokens, tokens_of_steps
from lightning_llm.schedules import Ramp, as_ramp, final_learning_rate, learning_rate, warmup_tokens
from lightning_llm.settings import UserError
from lightning_llm.stages.config import (
    INSERTED,
    EvaluateRewardsSettings,
    EvaluateSettings,
    GateSettings,
    GenerateSettings,
    GenerateStage,
    JudgeSettings,
    JudgeStage,
    MergeSettings,
    MergeStage,
    PrepareSettings,
    PruneSettings,
    PruneStage,
    ScoreSettings,
    SelectSettings,
    SelectStage,
    StageConfig,
    TeacherSettings,
    TokenizerSettings,
    TrainSettings,
    TrainStage,
    UpcycleSettings,
    UpcycleStage,
)
from lightning_llm.stages.context import model_directory

SAID = ("text", "conversations", "pairs")  # forms of rows that a tokenizer learns from
GATE_TRIALS = 10  # needles at each length and depth, where a gate asks for some and the evaluation says not how many
DATA_SEED = 0  # of tokenizers and prepared rows: they are the same for every seed of a sweep


@dataclass(frozen=True)
class Node:
    """One stage as it will run."""

    name: str
    kind: str  # the file of its verb in stages/
    settings: Any  # one of stages/config.py
    inputs: dict[str, str] = field(default_factory=dict)  # role -> name of a node, or the path of a model of elsewhere
    evaluate_every: float | None = None  # tokens; not part of the settings, since it decides nothing
    figures: dict[str, Any] = field(default_factory=dict)  # what the plan says about it

    @property
    def stage(self) -> str:
        """The recipe's stage that it belongs to; `tokenizer` and `evaluation` belong to all."""
        stage, _, inserted = self.name.rpartition(".")
        return stage if stage and inserted in INSERTED else self.name


def expand(recipe: Recipe) -> list[Node]:
    """All nodes of a scaled recipe, each after its inputs, and data before models: what is wrong with a row of the last
    stage is known before the first one trains.

    Raises:
        UserError: a model of elsewhere that is none, a mixture without sources.
    """
    assert recipe.is_scaled, "expand(scaled(recipe))"
    data: dict[str, Node] = {}
    later: list[Node] = []
    for node in _Expansion(recipe).nodes():
        if node.kind == "prepare" and data.keys() >= set(node.inputs.values()):
            data[node.name] = node
        else:
            later.append(node)
    return [*data.values(), *later]


class _Expansion:
    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.lineage = Lineage(recipe)
        self.ended_at: dict[str, float] = {}  # stage that trains -> its last learning rate
        self.order = order_of_stages(recipe.stages)
        self.first = next((stage for name in self.order if isinstance(stage := recipe.stages[name], TrainStage)), None)

    def nodes(self) -> Iterator[Node]:
        """Every node once, after its inputs."""
        made: set[str] = set()
        for name in self.order:
            for node in self._nodes_of(name, self.recipe.stages[name]):
                if node.name not in made:  # the shared ones come up with every stage
                    made.add(node.name)
                    yield node

    def _nodes_of(self, name: str, stage: StageConfig) -> Iterator[Node]:
        recipe = self.recipe
        if isinstance(stage, TrainStage):
            self.lineage.shapes[name] = (
                self.lineage.own_shape(stage) if stage.starts_from is None else self.lineage.shape(stage.starts_from)
            )
            yield from self._training(name, stage)
        elif isinstance(stage, MergeStage):
            self.lineage.shapes[name] = self.lineage.shape(stage.models[0])
            yield from self._merging(name, stage)
        elif isinstance(stage, PruneStage):
            yield from self._pruning(name, stage)
        elif isinstance(stage, UpcycleStage):
            yield from self._upcycling(name, stage)
        elif isinstance(stage, GenerateStage):
            yield from self._generation(name, stage)
        elif isinstance(stage, JudgeStage):
            inputs = {f"samples.{place}": source for place, source in enumerate(stage.data)}
            inputs |= {
                f"reward_model.{place}": self.lineage.source(model) for place, model in enumerate(stage.judged_by)
            }
            yield Node(name, "judge", JudgeSettings(stage.judge, recipe.compute.precision, recipe.seed), inputs)
        elif isinstance(stage, SelectStage):
            yield self._selection(name, stage)

    def _selection(self, name: str, stage: SelectStage) -> Node:
        own = {f.name for f in fields(SelectSettings)} - {"seed"}
        settings = SelectSettings(**{field: getattr(stage, field) for field in own}, seed=self.recipe.seed)
        if judge_that_only_ranks(stage, self.recipe.stages) is not None:
            settings = replace(settings, right_from=None)
        inputs: dict[str, str] = {}
        for number, source in enumerate(stage.data):
            before = self.recipe.stages[source]
            if isinstance(before, JudgeStage):
                inputs[f"verdicts.{number}"] = source
            samples = before.data if isinstance(before, JudgeStage) else [source]
            inputs |= {f"samples.{number}.{place}": sample for place, sample in enumerate(samples)}
        return Node(name, "select", settings, inputs)

    def _generation(self, name: str, stage: GenerateStage) -> Iterator[Node]:
        tokenizer, _ = self.lineage.shared(stage.models[0], name)
        yield Node(tokenizer, "prepare", self._tokenizer(self.lineage.root(stage.models[0], name)[1]))
        data = PrepareSettings(_rows_of(stage.data), [], ["train"], DATA_SEED)
        yield Node(f"{name}.prepare", "prepare", data, {"tokenizer": tokenizer})
        models = {f"model.{number}": self.lineage.source(model) for number, model in enumerate(stage.models)}
        settings = GenerateSettings(
            models=_called(stage.models),
            weights={source: float(config.weight) for source, config in stage.data.sources.items()},
            prompts=round(stage.prompts),
            round=stage.round,
            per_prompt=stage.per_prompt,
            max_new_tokens=stage.max_new_tokens,
            sampling=stage.sampling,
            precision=self.recipe.compute.precision,
            seed=self.recipe.seed,
            stop=stage.stop,
            engine=stage.engine,
        )
        yield Node(name, "generate", settings, models | {"data": f"{name}.prepare", "tokenizer": tokenizer})

    def _training(self, name: str, stage: TrainStage) -> Iterator[Node]:
        recipe = self.recipe
        assert self.first is not None, "it is this stage, or one before it"
        tokenizer, held_out = self.lineage.shared(name)
        yield Node(tokenizer, "prepare", self._tokenizer(self.lineage.root(name)[1]))
        speaks = not stage.objective.is_scored
        evaluates = stage.evaluate and any(part.sources for part in _parts(recipe.evaluation).values())
        if evaluates and speaks:
            yield Node(held_out, "prepare", self._held_out(), {"tokenizer": tokenizer})
        train = self._train(name, stage)
        contexts = sorted({int(entry["value"]) for entry in train.context})
        fitted = (
            contexts if stage.data.form != "text" and stage.rollout is None else []
        )  # prompts leave room themselves
        data = PrepareSettings(_rows_of(stage.data), fitted, ["train", "validation"], DATA_SEED)
        rows = self._rows_of_stages(stage.data)
        yield Node(f"{name}.prepare", "prepare", data, {"tokenizer": tokenizer, **rows})
        inputs = {"data": f"{name}.prepare", "tokenizer": tokenizer}
        source = {} if stage.starts_from is None else {"starts_from": self.lineage.source(stage.starts_from)}
        inputs |= {f"reward_model.{place}": self.lineage.source(model) for place, model in enumerate(stage.judged_by)}
        if stage.objective.needs_reference and stage.rollout is None:
            score = ScoreSettings(contexts[-1], ["train", "validation"], recipe.compute.precision, stage.data.on_long)
            yield Node(f"{name}.reference", "score", score, {"model": source["starts_from"], "data": f"{name}.prepare"})
            inputs["reference"] = f"{name}.reference"
        if stage.learns_from is not None:
            assert isinstance(stage.objective, DistillationConfig), "checked"
            if stage.objective.is_kept:
                self._refuse_large_k(name, stage.objective)
                asked = {
                    "model": self.lineage.source(stage.learns_from),
                    "data": f"{name}.prepare",
                    "tokenizer": tokenizer,
                }
                yield Node(f"{name}.teacher", "score", _teacher(stage.objective, train), asked)
                inputs["teacher"] = f"{name}.teacher"
            else:
                self._refuse_larger_head(name, stage.learns_from, stage.objective)
                inputs["teacher_model"] = self.lineage.source(stage.learns_from)
        if stage.optimizer.online_merging.is_on:
            assert stage.starts_from is not None, "checked"
            merging = stage.optimizer.online_merging
            inputs["merging_base"] = self.lineage.source(merging.base or "")
            inputs["merging_reference"] = self.lineage.source(merging.reference or stage.starts_from)
        yield Node(name, "train", train, source | inputs, stage.evaluate_every)
        if stage.evaluate and not speaks:
            yield self._evaluation_of_rewards(name, name, inputs)
        elif evaluates:
            reference = stage.objective.needs_reference
            yield self._evaluation(name, contexts[-1], tokenizer, held_out, source, has_reference=reference)
            if stage.gate.is_on:
                yield self._gate(name, stage)

    def _refuse_large_k(self, name: str, objective: DistillationConfig) -> None:
        """Refuse to keep more ids than there are beside the label and one of the rest."""
        most = self.lineage.shapes[name].vocab_size - 2
        if objective.targets == "top_k" and objective.k > most:
            what = f"is {objective.k:,}, and of {most + 2:,} ids {most:,} can be kept beside the label and the rest"
            raise UserError(f"stages.{name}.objective.k", what, f"Give at most {most}, or choose targets=full")

    def _refuse_larger_head(self, name: str, teacher: str, objective: DistillationConfig) -> None:
        """Refuse a student whose head has rows for which KL(student || teacher) is infinite.

        To leave these rows out would train all others well and let the student go on sampling them.
        """
        if objective.direction != "reverse":
            return  # nor is the config.json of a teacher of elsewhere read for it
        own, others = self.lineage.shapes[name].vocab_size, self.lineage.shape(teacher).vocab_size
        if own > others:
            raise UserError(
                f"stages.{name}.objective.direction",
                f"is reverse, which is infinite of ids that the teacher lacks: it has {others:,}, the student {own:,}",
                "Choose forward or jensen_shannon, or a teacher with as many",
            )

    def _gate(self, name: str, stage: TrainStage) -> Node:
        """It stands before all that is made from the stage, and in nobody's key: it lets pass or stops, and makes
        nothing."""
        inputs = {"evaluation": f"{name}.evaluate"}
        if stage.gate.short_context is not None:
            inputs["before"] = f"{before_gates(name, self.recipe.stages)}.evaluate"
        return Node(f"{name}.gate", "gate", GateSettings(stage.gate.short_context, stage.gate.needle), inputs)

    @staticmethod
    def _rows_of_stages(data: DataConfig) -> dict[str, str]:
        """Inputs of a node that prepares rows: those that other stages make."""
        made = {name: source.path for name, source in data.sources.items() if source.path and is_of_stage(source.path)}
        return {f"source.{name}": path.removeprefix(STAGE) for name, path in made.items()}

    def _merging(self, name: str, stage: MergeStage) -> Iterator[Node]:
        models = {f"model.{number}": self.lineage.source(model) for number, model in enumerate(stage.models)}
        source = {} if stage.starts_from is None else {"starts_from": self.lineage.source(stage.starts_from)}
        settings = MergeSettings(stage.method, self.recipe.seed if stage.method.draws else 0)
        yield Node(name, "merge", settings, models | source)
        last = self.recipe.stages.get(trained_behind(name, self.recipe.stages) or "")
        reference = isinstance(last, TrainStage) and last.objective.needs_reference and bool(source)
        if stage.evaluate:
            yield from self._evaluation_of_made(name, source, has_reference=reference)

    def _pruning(self, name: str, stage: PruneStage) -> Iterator[Node]:
        assert stage.starts_from is not None, "checked"
        sizes: dict[str, int | None] = dict.fromkeys(SIZES) | stage.sizes
        if stage.method.needs_masks:
            sizes["intermediate_size"] = units_of_masks(name, stage, self.recipe.stages)
        source = {"starts_from": self.lineage.source(stage.starts_from)}
        settings = PruneSettings(stage.method, **sizes, data=DataConfig(), tokens=0, context=0, precision="", seed=0)
        inputs = dict(source)
        if stage.method.needs_data:
            tokenizer, _ = self.lineage.shared(name)
            yield Node(tokenizer, "prepare", self._tokenizer(self.lineage.root(name)[1]))
            fitted = [stage.context] if stage.data.form != "text" else []
            data = PrepareSettings(_rows_of(stage.data), fitted, ["train"], DATA_SEED)
            rows = self._rows_of_stages(stage.data)
            yield Node(f"{name}.prepare", "prepare", data, {"tokenizer": tokenizer, **rows})
            inputs |= {"data": f"{name}.prepare", "tokenizer": tokenizer}
            settings = replace(
                settings,
                data=replace(stage.data, tokens_per_example=None),
                tokens=round(stage.tokens),
                context=stage.context,
                precision=self.recipe.compute.precision,
                seed=self.recipe.seed,
            )
        node = Node(name, "prune", settings, inputs)
        self.lineage.shapes[name] = shape_left(node, self.lineage.shape(stage.starts_from))
        yield node
        if stage.evaluate:
            yield from self._evaluation_of_made(name, source, has_reference=False)

    def _upcycling(self, name: str, stage: UpcycleStage) -> Iterator[Node]:
        assert stage.starts_from is not None, "checked"
        own = {f.name for f in fields(UpcycleSettings)} - {"seed"}
        settings = UpcycleSettings(**{field: getattr(stage, field) for field in own}, seed=self.recipe.seed)
        source = {"starts_from": self.lineage.source(stage.starts_from)}
        node = Node(name, "upcycle", settings, source)
        self.lineage.shapes[name] = shape_left(node, self.lineage.shape(stage.starts_from))
        yield node
        if stage.evaluate:
            yield from self._evaluation_of_made(name, source, has_reference=False)

    def _evaluation_of_made(self, name: str, source: dict[str, str], *, has_reference: bool) -> Iterator[Node]:
        """Of a model that no training has made, as that of what was trained behind it.

        Args:
            has_reference: preferences are measured by implicit rewards.
        """
        trained = trained_behind(name, self.recipe.stages)
        tokenizer, held_out = self.lineage.shared(name)
        if self.lineage.scores(name):
            if trained is not None:  # what the first of them was trained on holds out rows; nobody else's data is known
                data = {"data": f"{trained}.prepare", "tokenizer": tokenizer}
                yield self._evaluation_of_rewards(name, trained, data)
        elif any(part.sources for part in _parts(self.recipe.evaluation).values()):
            yield Node(tokenizer, "prepare", self._tokenizer(self.lineage.root(name)[1]))
            yield Node(held_out, "prepare", self._held_out(), {"tokenizer": tokenizer})
            context = self._last_context(name, trained)
            yield self._evaluation(name, context, tokenizer, held_out, source, has_reference=has_reference)

    def _last_context(self, model: str, trained: str | None) -> int:
        """Of the training behind a model; of one of elsewhere what it can read, up to the scale's context."""
        stage = self.recipe.stages.get(trained or "")
        if isinstance(stage, TrainStage):
            return max(int(entry["value"]) for entry in _whole(as_ramp(stage.context)))
        longest = self.lineage.shapes[model].max_position_embeddings
        return min(longest, self.recipe.scale.context or longest)

    def _evaluation(
        self,
        name: str,
        context: int,
        tokenizer: str,
        held_out: str,
        source: dict[str, str],
        *,
        has_reference: bool,
    ) -> Node:
        """Of a language model, against what it started from.

        Args:
            context: the longest of its training.
            has_reference: preferences are measured by implicit rewards.
        """
        recipe, stage = self.recipe, self.recipe.stages[name]
        evaluation = _without_sources(recipe.evaluation)
        needle = recipe.evaluation.needle
        if isinstance(stage, TrainStage) and stage.gate.needle is not None:
            needle = replace(needle, trials=needle.trials or GATE_TRIALS)
        if needle.trials:
            evaluation = replace(evaluation, needle=needle)
        settings = EvaluateSettings(
            evaluation=evaluation,
            context=int(as_ramp(self.first.context)[0]["value"]) if self.first else context,
            full_context=context,
            preference_mode="implicit_reward" if has_reference else "likelihood",
            precision=recipe.compute.precision,
            seed=recipe.seed,
        )
        inputs = {"model": name, "data": held_out, "tokenizer": tokenizer, **source}
        return Node(f"{name}.evaluate", "evaluate", settings, inputs)

    def _evaluation_of_rewards(self, name: str, trained: str, inputs: dict[str, str]) -> Node:
        """Of a reward model, on what the data of a training stage holds out."""
        stage = self.recipe.stages[trained]
        assert isinstance(stage, TrainStage)
        context = max(int(entry["value"]) for entry in _whole(as_ramp(stage.context)))
        settings = EvaluateRewardsSettings(
            self.recipe.evaluation.comparisons, context, stage.data.on_long, self.recipe.compute.precision
        )
        return Node(f"{name}.evaluate", "evaluate", settings, inputs | {"model": name})

    def _tokenizer(self, outside: str | None) -> TokenizerSettings:
        recipe = self.recipe
        source = recipe.model.tokenizer
        if outside is not None and not recipe.is_pinned("model.tokenizer"):
            source = str(model_directory(Path(self.lineage.source(outside))))
            if not (Path(source) / "tokenizer.json").is_file():
                raise UserError(
                    source, "has a model but no tokenizer.json", "Put the model's tokenizer files beside it"
                )
        if source != "train":
            return TokenizerSettings(TokenizerConfig(), source, DATA_SEED)
        assert self.first is not None, "a model of random weights is trained by a stage"
        config, first = recipe.tokenizer, self.first.data
        if not config.sources:
            # conversations too: spelt out letter by letter, the words of a chat would cost several tokens each
            own = {
                name: source
                for name, source in first.sources.items()
                if not is_prepared(source.path) and not is_of_stage(source.path)
            }
            # without what is only judged, so that a stage that judges or is judged leaves the others as they are
            said = [stage.data for stage in recipe.stages.values() if isinstance(stage, TrainStage)]
            learnt = {n for data in said if data.form in SAID for n in data.sources}
            corpora = {name: source for name, source in recipe.scale.corpora.items() if name in learnt}
            sources = {**corpora, **own}  # of tokens no merges can be learnt
            config = replace(config, sources={name: source for name, source in sources.items() if source.path})
        sources = {name: replace(source, weight=1.0) for name, source in config.sources.items()}
        return TokenizerSettings(replace(config, sources=sources), source, DATA_SEED, first.validation)

    def _held_out(self) -> PrepareSettings:
        """One mixture of all that is evaluated; the part stands in front of the source's name."""
        evaluation = self.recipe.evaluation
        _refuse_questions_that_are_not(evaluation)
        sources, shares = {}, set()
        for part, data in _parts(evaluation).items():
            for name, source in data.sources.items():
                if source.path == "embedded:tasks":  # as many questions as are asked
                    each = math.ceil(evaluation.questions / len(data.sources))
                    source = replace(source, options={"questions": each, **source.options})
                sources[f"{part}/{name}"] = source
                shares.add(data.validation)
        for name, stage in self.recipe.stages.items():
            data = getattr(stage, "data", None)
            if not isinstance(data, DataConfig) or not data.sources:
                continue
            if shares and data.validation < max(shares):
                raise UserError(
                    f"stages.{name}.data.validation",
                    f"holds out {data.validation:g} of the rows, the evaluation takes {max(shares):g}",
                    "Make it at least as large, so that nothing evaluated has been trained on",
                )
        data = DataConfig(name="evaluation", sources=sources, validation=max(shares, default=0.0))
        return PrepareSettings(_rows_of(data), [], ["validation"], DATA_SEED)

    def _train(self, name: str, stage: TrainStage) -> TrainSettings:
        refuse_masks_of_another_size(name, masks_of(stage), self.lineage.shapes[name])
        context, batch = _whole(as_ramp(stage.context)), _whole(as_ramp(stage.batch_tokens))
        tokens = round(length_in_tokens(f"stages.{name}", stage, batch))
        lr = resolve_learning_rate(self._with_peak(name, stage), tokens, batch)
        self.ended_at[name] = learning_rate(lr, tokens, tokens)
        draws = stage.starts_from is None or stage.objective.draws
        return TrainSettings(
            model=replace(self.lineage.shapes[name], published={}, tokenizer="train"),
            objective=stage.objective,
            optimizer=_without_edges(stage.optimizer),
            data=replace(stage.data, tokens_per_example=None),
            lr=lr,
            tokens=max(tokens, 1),
            context=context,
            batch_tokens=batch,
            rope_theta=stage.rope_theta,
            rope_scaling=stage.rope_scaling,
            precision=self.recipe.compute.precision,
            seed=self.recipe.seed + stage.seed_offset,
            rollout=stage.rollout,
            judge=stage.judge,
            averaging=stage.averaging if stage.averaging.is_on else None,
            # siblings by `seed_offset` begin as one model; nothing is said, and no key changed, where none is drawn
            seed_of_parameters=self.recipe.seed if stage.seed_offset and draws else None,
        )

    def _with_peak(self, name: str, stage: TrainStage) -> LearningRateConfig:
        """A stage's schedule, from where the training behind it has ended if it has no peak of its own.

        Raises:
            UserError: that has ended at 0.
        """
        if stage.lr.peak is not None:
            return stage.lr
        before = trained_behind(stage.starts_from or "", self.recipe.stages)
        assert before is not None, "checked"
        if not self.ended_at[before]:
            what = f"has no value, and the learning rate of {before} has ended at 0: nothing would be learnt"
            raise UserError(f"stages.{name}.lr.peak", what, "Give it a number")
        return replace(stage.lr, peak=self.ended_at[before])


def _teacher(objective: DistillationConfig, train: TrainSettings) -> TeacherSettings:
    """What is kept of a teacher's expectations for a stage: its objective's choice, whatever weight they get."""
    kept = {"k": objective.k, "stored_as": objective.stored_as, "temperature": objective.temperature}
    contexts = [int(entry["value"]) for entry in train.context]
    return TeacherSettings(
        max(contexts),
        ["train"],
        train.precision,
        train.data.on_long,
        data=train.data,
        contexts=contexts,
        tokens=train.tokens,
        seed=train.seed,
        **(kept if objective.targets == "top_k" else {}),
    )


def resolve_learning_rate(lr: LearningRateConfig, tokens: int, batch: Ramp) -> LearningRateConfig:
    """The same schedule, which has a peak, with its end and its warm-up as figures, the latter in tokens."""
    if lr.warmup_steps is not None:
        lr = replace(lr, warmup_steps=None, warmup_tokens=tokens_of_steps(lr.warmup_steps, batch))
    warmup = round(warmup_tokens(lr, tokens))
    final = final_learning_rate(lr)
    return replace(lr, final=final, final_share=None, warmup_tokens=float(min(warmup, tokens)), warmup_share=None)


def _without_edges(optimizer: OptimizerConfig) -> OptimizerConfig:
    """What decides a step; which models it is merged with is told by the inputs."""
    return replace(optimizer, online_merging=replace(optimizer.online_merging, base=None, reference=None))


def _called(models: Sequence[str]) -> list[str]:
    """What tables call models: a stage by its name, one of elsewhere its folder's, or its path if two have that."""
    names = [Path(model).parent.name if Path(model).name == "model" else Path(model).name for model in models]
    return [name if name and names.count(name) == 1 else model for name, model in zip(names, models, strict=True)]


def _refuse_questions_that_are_not(evaluation: EvaluationConfig) -> None:
    """Embedded questions are made by rule, but each of them once: of two-digit sums few are held out."""
    sources = evaluation.tasks.sources.values()
    asked = [source.options for source in sources if source.path == "embedded:tasks"]
    each = math.ceil(evaluation.questions / max(len(sources), 1))
    counts = [fewest_questions(options.get("task"), each) for options in asked if "questions" not in options]
    task, count = min(counts, key=lambda entry: entry[1], default=("", each))
    if count < each:
        raise UserError(
            "evaluation.questions",
            f"is {evaluation.questions}, so {each} of each task, and {count} different ones of {task} are held out",
            f"Give at most {count * len(sources)}",
        )


def _parts(evaluation: EvaluationConfig) -> dict[str, DataConfig]:
    return {"text": evaluation.text, "tasks": evaluation.tasks, "pairs": evaluation.pairs}


def _without_sources(evaluation: EvaluationConfig) -> EvaluationConfig:
    """What decides an evaluation beside its data, which has a key of its own. Comparisons are for reward models, and
    needles are for those that are to find some."""
    empty = {part: DataConfig(name=data.name, form=data.form) for part, data in _parts(evaluation).items()}
    neutral = EvaluationConfig()
    return replace(evaluation, **empty, comparisons=neutral.comparisons, needle=neutral.needle)


def _rows_of(data: DataConfig) -> DataConfig:
    """A mixture without what decides only how its rows are consumed: stages that share rows share the tokens too."""
    sources: dict[str, SourceConfig] = {name: replace(source, weight=1.0) for name, source in data.sources.items()}
    neutral = DataConfig()
    return replace(data, name=data.form, sources=sources, tokens_per_example=None, max_epochs=neutral.max_epochs)


def _whole(ramp: Ramp) -> Ramp:
    return [{"at": round(entry["at"]), "value": round(entry["value"])} for entry in ramp]
