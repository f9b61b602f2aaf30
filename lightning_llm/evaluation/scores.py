"""Judges that score without knowing what is right: reward models, length, mixtures, and two controls."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.evaluation.config import (
    LengthConfig,
    RandomConfig,
    RewardModelJudgeConfig,
    SubstringConfig,
    WeightedConfig,
)
from lightning_llm.evaluation.judges import Judge, JudgeContext, Question, Response, Verdict, refuse_unknown_answers
from lightning_llm.models.reward import RewardModel
from lightning_llm.settings import UserError


class RewardModelScore:
    """Scores of one reward model, or the mean or the smallest of several.

    Raises:
        UserError: there is no reward model, or one is damaged.
    """

    def __init__(self, config: RewardModelJudgeConfig, context: JudgeContext):
        if not context.reward_models:
            raise UserError(
                "judge", "asks a reward model, and there is none", "Name a stage or a directory in judged_by"
            )
        self.config, self.context = config, context
        self.models = [
            RewardModel.from_pretrained(path).eval().requires_grad_(False).to(context.device)
            for path in context.reward_models
        ]

    @torch.no_grad()
    def __call__(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Verdict]:
        """Read at each response's last token; a prompt that stands before several is computed once."""
        rows: list[torch.Tensor] = []
        for batch in batches(questions, responses, self.context.max_tokens):
            here = batch.to(self.context.device)
            answers = torch.tensor([prefix >= 0 for prefix in batch.prefixes])
            rows.append(torch.stack([model.scores(here).float().cpu()[answers] for model in self.models], dim=1))
        scores = torch.cat(rows) if rows else torch.zeros(0, len(self.models))  # [responses, models]
        whole = scores.mean(1) if self.config.ensemble == "mean" else scores.amin(1)
        names = [f"reward_model.{number}" for number in range(len(self.models))] if len(self.models) > 1 else []
        return [
            Verdict(score, dict(zip(names, parts, strict=False)))
            for score, parts in zip(whole.tolist(), scores.tolist(), strict=True)
        ]


def batches(questions: Sequence[Question], responses: Sequence[Response], max_tokens: int) -> Iterator[SegmentBatch]:
    """Prompts with their responses, in order, in batches of about `max_tokens`; a group that is larger goes alone."""
    prompts: list[list[int]] = []
    groups: list[list[list[int]]] = []
    tokens = 0
    for question, response in zip(questions, responses, strict=True):
        is_new = not prompts or prompts[-1] != question.prompt_ids
        cost = len(response.ids) + (len(question.prompt_ids) if is_new else 0)
        if prompts and tokens + cost > max_tokens:
            yield SegmentBatch.from_groups(prompts, groups)
            prompts, groups, tokens, is_new = [], [], 0, True
            cost = len(response.ids) + len(question.prompt_ids)
        if is_new:
            prompts.append(question.prompt_ids)
            groups.append([])
        groups[-1].append(response.ids)
        tokens += cost
    if prompts:
        yield SegmentBatch.from_groups(prompts, groups)


class LengthShaping:
    """Minus what a response's tokens above a free number cost, and what being cut off does."""

    def __init__(self, config: LengthConfig, context: JudgeContext):
        self.config = config

    def __call__(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Verdict]:
        """0 or less."""
        config = self.config
        return [
            Verdict(
                -config.per_token * max(len(response.ids) - config.free, 0)
                - config.cut_off * (not response.is_complete)
            )
            for response in responses
        ]


class RandomScore:
    """A number in [0, 1) that depends on seed, question and response, and on nothing that makes one better."""

    def __init__(self, config: RandomConfig, context: JudgeContext):
        self.seed = context.seed

    def __call__(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Verdict]:
        """The same whenever the same response to the same question is judged with the same seed."""
        return [Verdict(self._score(*pair)) for pair in zip(questions, responses, strict=True)]

    def _score(self, question: Question, response: Response) -> float:
        text = f"{self.seed}\0{question.prompt}\0{response.text}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64


class Substring:
    """Whether the known answer stands anywhere in a response, whatever else does."""

    def __init__(self, config: SubstringConfig, context: JudgeContext):
        pass

    def __call__(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Verdict]:
        """1 where it does, else 0.

        Raises:
            UserError: nobody knows an answer.
        """
        refuse_unknown_answers("substring", questions)
        return [Verdict(float(q.answer in r.text)) for q, r in zip(questions, responses, strict=True)]


class WeightedSum:
    """Several judges' scores, each times its weight; the parts keep the scores as they were."""

    def __init__(self, config: WeightedConfig, context: JudgeContext):
        if not config.parts:
            raise UserError("judge.parts", "is empty", "Give it parts, each with a judge and a weight")
        self.weights = {name: part.weight for name, part in config.parts.items()}
        self.judges: dict[str, Judge] = {name: part.judge.build(context) for name, part in config.parts.items()}

    def __call__(self, questions: Sequence[Question], responses: Sequence[Response]) -> list[Verdict]:
        """All judges are asked, also those of weight 0."""
        scores = {name: [v.score for v in judge(questions, responses)] for name, judge in self.judges.items()}
        rows = [dict(zip(scores, row, strict=True)) for row in zip(*scores.values(), strict=True)]
        return [Verdict(sum(self.weights[name] * score for name, score in row.items()), row) for row in rows]
