"""Training data that the policy makes meanwhile: prompts in, windows of its own judged responses out.

Lightning asks for a window after the step before it, so what is drawn is drawn by the newest weights, and is as old as
`rollout.steps` and `rollout.epochs` say when it is used. All else is decided by the seed and counters: which prompts
a record asks, which number each response has, which responses a step learns from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.config import DataConfig
from lightning_llm.data.experience import Experience, Group, build_batch
from lightning_llm.data.packing import Window, share_out
from lightning_llm.data.token_store import TokenStore
from lightning_llm.data.turns import draw_places
from lightning_llm.evaluation.judges import Question
from lightning_llm.evaluation.questions import read_question
from lightning_llm.generation.config import SamplingConfig
from lightning_llm.models.size import forward_flops
from lightning_llm.objectives.base import Objective
from lightning_llm.optimization.window import Sums, Totals
from lightning_llm.schedules import BatchPlan, Progress, Ramp
from lightning_llm.settings import UserError
from lightning_llm.training.actor import Actor

Place = tuple[str, int]  # source, row


class Prompts:
    """The prompts of one split, by source; those that leave no room for a response are left out."""

    def __init__(self, prepared: Path, split: str, data: DataConfig, context: int):
        self.weights = {name: float(source.weight) for name, source in data.sources.items()}
        self.stores = {name: TokenStore.open(prepared / "sources" / name / split) for name in self.weights}
        self.contents = {name: store.metadata() for name, store in self.stores.items()}
        fits = {name: np.flatnonzero(store.row_lengths < context) for name, store in self.stores.items()}
        self.rows = {name: rows for name, rows in fits.items() if len(rows) and self.weights[name]}
        self.dropped = {name: self.stores[name].rows - len(rows) for name, rows in fits.items()}

    def places(self, count: int, turn: int, seed: int) -> list[Place]:
        """Whose turn it is; fewer than `count` where there are no more."""
        if not self.rows:
            return []
        counts = {name: len(rows) for name, rows in self.rows.items()}
        weights = {name: self.weights[name] for name in counts}
        return [(name, int(self.rows[name][at])) for name, at in draw_places(counts, weights, count, turn, seed)]

    def question(self, place: Place) -> Question:
        """What is asked there."""
        name, row = place
        return read_question(self.stores[name], row, self.contents[name][row])


class Rollouts:
    """The live source of a stage, in the place of `StageData`. A step's window can be asked for after the step before.

    What is drawn at once is a record (`data/experience.py`) in the folder `records`. A record that is there is taken as
    it is and not drawn again, so that a stage can be gone through once more and makes the same updates; one that was
    killed goes on behind its last record.
    """

    def __init__(
        self,
        prepared: Path,
        data: DataConfig,
        actor: Actor,
        *,
        as_pairs: bool,
        batch_ramp: Ramp,
        total_tokens: int,
        seed: int,
        records: Path,
        judging_cost: Callable[[list[tuple[int, int]]], float] | None = None,
    ):
        """
        Args:
            prepared: an artifact of the stage `prepare`, of form questions or prompts.
            as_pairs: learn from the best response to each prompt against the worst; otherwise from all.
            batch_ramp: nominal tokens of an optimizer step; they decide how many steps there are.
            judging_cost: FLOPs of the models that judge, for segments given as (tokens, tokens of the prefix); None: no
                model judges.

        Raises:
            UserError: no prompt can be asked.
        """
        self.actor, self.config, self.as_pairs = actor, actor.config, as_pairs
        self.seed, self.records, self.judging_cost = seed, records, judging_cost
        self.plan = BatchPlan(batch_ramp, total_tokens)
        self.steps = self.plan.steps
        self.sources = list(data.sources)
        self.prompts = Prompts(prepared, "train", data, actor.context)
        self.dropped = self.prompts.dropped
        self._at_once = len(self.prompts.places(self.config.prompts * self.config.steps, 0, seed))
        if not self._at_once:
            raise UserError("data.sources", "hold no prompt that can be asked", "Give them rows, or shorter ones")
        held_out = Prompts(prepared, "validation", data, actor.context)
        self.held_out = [held_out.question(place) for place in held_out.places(self.config.held_out, 0, 0)]
        self.recorded = len([path for path in records.glob("*") if path.name.isdecimal()])  # by an interrupted run
        self._record: Experience | None = None
        self._ledgers: list[dict[str, int]] = [dict.fromkeys(self.sources, 0)]  # before each step that was asked for

    def ledger(self, step: int) -> dict[str, int]:
        """Tokens of each source that the steps before `step` have learnt from; as far as they were asked for."""
        return dict(self._ledgers[min(step, len(self._ledgers) - 1)])

    def progress(self, step: int) -> Progress:
        """The counters before `step`; tokens and prompts are nominal."""
        return Progress(tokens=self.plan.boundary(step), samples=step * self.config.prompts, steps=step)

    def window(self, step: int, *, rank: int = 0, world_size: int = 1, micro_batch_tokens: int) -> Window:
        """What step `step` learns from, and rank `rank`'s micro-batches of it. All ranks ask for the same step.

        Raises:
            IndexError: the stage has no such step.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        self.actor.reference.follow(self.actor.policy, step)
        number, turn = divmod(step, self._steps_of_record)
        flops = 0.0
        if self._record is None or self._record.number != number:
            self._record, flops = self._take(number, step, rank, world_size)
        groups = self._of_turn(self._record, turn)
        learnt = [pair for group in groups if (pair := group.pair())] if self.as_pairs else groups
        shares = share_out([group.length for group in learnt], world_size, micro_batch_tokens)
        consumed = dict.fromkeys(self.sources, 0)
        for group in learnt:
            consumed[group.question["source"]] += group.length
        if step == len(self._ledgers) - 1:
            self._ledgers.append({name: tokens + consumed[name] for name, tokens in self._ledgers[-1].items()})
        responses = [response for group in learnt for response in group.responses]
        return Window(
            step=step,
            progress=self.progress(step + 1),
            mine=[build_batch([learnt[i] for i in share]) for share in shares[rank::world_size]],
            target_tokens=sum(len(response.ids) for response in responses),
            pairs=len(learnt) if self.as_pairs else 0,
            consumed=consumed,
            segments=[segment for group in learnt for segment in group.segments],
            samples=len(groups),
            context=self.actor.context,
            responses=len(responses),
            figures={**figures(groups, self.config.sampling, self.actor.judge is not None), "staleness": (turn, 1)},
            flops=flops,
        )

    def validate(self, objective: Objective, rank: int, ranks: int) -> Totals:
        """Mean reward, length and completeness of the policy's responses to held-out prompts; ranks share them.

        Where nobody judges, the loss of these responses takes the reward's place.
        """
        totals = Totals()
        numbers = list(range(len(self.held_out)))[rank::ranks]
        questions = [self.held_out[number] for number in numbers]
        answers = self.actor.held_out(questions, numbers)
        for answer in answers:
            if self.actor.judge is not None:
                totals.add("validation/reward/mean", answer.verdict.score, 1)
            totals.add("validation/responses/length", len(answer.response.ids), 1)
            totals.add("validation/responses/complete", answer.response.is_complete, 1)
        if self.actor.judge is None:
            pairs = list(zip(questions, answers, strict=True))
            lengths = [len(question.prompt_ids) + len(answer.response.ids) for question, answer in pairs]
            for share in share_out(lengths, 1, self.actor.max_tokens):
                if share:
                    prompts = [pairs[i][0].prompt_ids for i in share]
                    batch = SegmentBatch.from_groups(prompts, [[pairs[i][1].response.ids] for i in share])
                    totals.add_loss(objective.loss(batch.to(objective.device)), prefix="validation/")
        return totals

    # ---- records ----

    def _take(self, number: int, step: int, rank: int, ranks: int) -> tuple[Experience, float]:
        """The record of a number, and the FLOPs that it took; each rank draws its share, and has all of it then."""
        folder = self.records / f"{number:06d}"
        if folder.is_dir():
            return Experience.load(folder), 0.0
        in_all = self.config.round * self._numbers + number  # records before it, with those of the rounds before
        places = self.prompts.places(self.config.prompts * self.config.steps, in_all, self.seed)
        places = places[: math.ceil(self._at_once / self.config.steps * self._parts(number))]
        before, each = in_all * self._at_once * self.config.per_prompt, self.config.per_prompt
        own = list(range(len(places)))[rank::ranks]
        numbers = [before + at * each + response for at in own for response in range(each)]
        drawn = self.actor.draw([self.prompts.question(places[at]) for at in own], numbers)
        found: list[Group | None] = [None] * len(places)
        for at, group in (pair for part in _gathered(list(zip(own, drawn, strict=True)), ranks) for pair in part):
            found[at] = Group({"source": places[at][0], **group.question}, group.prompt_ids, group.responses)
        record = Experience(number, step, before, [group for group in found if group is not None])
        if rank == 0:
            record.save(folder)
        segments = [segment for group in record.groups for segment in group.segments]
        judged = 0.0 if self.judging_cost is None else self.judging_cost(segments)
        return record, 3 * forward_flops(self.actor.policy.config, segments) + judged  # drawn, and scored by two models

    @property
    def _steps_of_record(self) -> int:
        """Optimizer steps that learn from a record, in all its passes."""
        return self.config.steps * self.config.epochs

    @property
    def _numbers(self) -> int:
        """Records of the stage."""
        return math.ceil(self.steps / self._steps_of_record)

    def _parts(self, number: int) -> int:
        """Optimizer steps of one pass over a record: as many as are asked for, fewer in the stage's last."""
        left = self.steps - number * self._steps_of_record
        return min(self.config.steps, math.ceil(left / self.config.epochs))

    def _of_turn(self, record: Experience, turn: int) -> list[Group]:
        """The prompts of the turn-th step after a drawing; each pass goes over all of them, in an order of its own."""
        parts = self._parts(record.number)
        epoch, part = divmod(turn, parts)
        order = np.random.default_rng([self.seed, record.number, epoch]).permutation(len(record.groups))
        return [record.groups[at] for at in np.array_split(order, parts)[part]]


def _gathered(own: list, ranks: int) -> Sequence[list]:
    """What every rank has made, on every rank."""
    if ranks == 1:
        return [own]
    everyone: list[list] = [[]] * ranks
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def figures(groups: Sequence[Group], sampling: SamplingConfig, judged: bool = True) -> Sums:
    """What is to be said of responses, as sums over them and counts.

    reward/mean, reward/parts/*      as the judge has it, if there is one
    reward/ties                      share of prompts whose responses are all worth the same
    kl/reference                     log policy - log reference of a response, in nats: the KL divergence in the mean
    entropy                          minus the log-probability of a token
    responses/length, /complete      tokens; share that ended by itself
    logps/gap, /gap_max              |sampler - trainer| of a token's log-probability, mean and largest of a step; only
                                     where the policy itself was drawn from, as otherwise the two are to differ
    """
    responses = [response for group in groups for response in group.responses]
    count, tokens = len(responses), sum(len(response.ids) for response in responses)
    rewards: Sums = {}
    if judged:
        ties = sum(group.is_tied for group in groups)
        rewards["reward/mean"] = (sum(response.reward for response in responses), count)
        rewards["reward/ties"] = (ties, len(groups))
    found: Sums = rewards | {
        "kl/reference": (sum(float(np.sum(r.sampled_logps - r.reference_logps)) for r in responses), count),
        "entropy": (-sum(float(np.sum(response.sampled_logps)) for response in responses), tokens),
        "responses/length": (tokens, count),
        "responses/complete": (sum(response.is_complete for response in responses), count),
    }
    for response in responses:
        for name, score in response.parts.items():
            total, units = found.get(f"reward/parts/{name}", (0.0, 0))
            found[f"reward/parts/{name}"] = total + score, units + 1
    if sampling == SamplingConfig() and responses:
        gaps = np.concatenate([np.abs(response.sampler_logps - response.sampled_logps) for response in responses])
        found |= {"logps/gap": (float(gaps.sum()), tokens), "logps/gap_max": (float(gaps.max()), 1)}
    return found
