"""The policy as it is now answers prompts; its answers are judged, and scored by the same passes that train it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.experience import Drawn, Group
from lightning_llm.data.packing import share_out
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.evaluation.judges import Judge, Question, Response, Verdict
from lightning_llm.generation.engine import Sample, Sampler
from lightning_llm.merging.averaging import follow
from lightning_llm.models import Transformer
from lightning_llm.objectives.base import token_logps
from lightning_llm.training.config import RolloutConfig
from lightning_llm.training.phases import Phases


class Reference:
    """The model that KL is measured to: the policy as it was at first, or an average that follows it.

    It is no child of a module, so it is neither trained nor saved with the policy.
    """

    def __init__(self, policy: Transformer, decay: float | None):
        """
        Args:
            decay: of the average, per optimizer step; None: the weights stay what they are.
        """
        self.model = copy.deepcopy(policy).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0  # optimizer steps that it has followed

    @torch.no_grad()
    def follow(self, policy: Transformer, steps: int) -> None:
        """Reference = decay x reference + (1 - decay) x policy, once for every optimizer step.

        Args:
            steps: optimizer steps that the policy has made; it is asked between any two of them.
        """
        if self.decay is None or steps == self.steps:
            return
        assert steps == self.steps + 1, "an average has to see every step"
        self.steps = steps
        model = self.model.to(policy.embed_tokens.weight.device)
        own = dict(model.named_parameters())
        follow(own, dict(zip(own, policy.parameters(), strict=True)), 1 - self.decay)


@dataclass(frozen=True)
class Answer:
    """A response with what it was drawn with and what it was found to be worth."""

    sample: Sample
    response: Response
    verdict: Verdict


class Actor:
    """Draws experience. What it says depends on weights, seed and each response's number, not on who else is asked."""

    def __init__(
        self,
        policy: Transformer,
        judge: Judge | None,
        tokenizer: Tokenizer,
        config: RolloutConfig,
        *,
        context: int,
        max_tokens: int,
        precision: str,
        seed: int,
    ):
        """
        Args:
            judge: says what responses are worth; None: nobody asks, and all are worth 0.
            context: tokens of prompt and response, at most.
            max_tokens: of one pass, and of the cache.
            precision: of the products, as in training: fp32 or bf16.
        """
        self.policy, self.judge, self.tokenizer, self.config = policy, judge, tokenizer, config
        self.context, self.max_tokens, self.precision, self.seed = context, max_tokens, precision, seed
        self.reference = Reference(policy, config.ema_decay if config.reference == "ema" else None)
        self.phases = Phases()
        self._sampler: Sampler | None = None

    def draw(self, questions: Sequence[Question], numbers: Sequence[int]) -> list[Group]:
        """A group for each question: its responses, judged, with all log-probabilities.

        Args:
            numbers: of the responses, so many for each question as are drawn, question by question.
        """
        with self._asking():
            answers = self._answers(questions, numbers, "rollout")
            each = self.config.per_prompt
            asked = [(q, answers[at * each : (at + 1) * each]) for at, q in enumerate(questions)]
            prompts = [question.prompt_ids for question in questions]
            ids = [[answer.sample.ids for answer in of_prompt] for _, of_prompt in asked]
            with self.phases("score"):
                sampled = logps_by_token(self.policy, prompts, ids, self.max_tokens)
                reference = self.reference.model.to(self.policy.embed_tokens.weight.device)
                referred = logps_by_token(reference, prompts, ids, self.max_tokens)
        return [
            Group(known(question), question.prompt_ids, list(map(recorded, of_prompt, *logps)))
            for (question, of_prompt), *logps in zip(asked, sampled, referred, strict=True)
        ]

    def held_out(self, questions: Sequence[Question], numbers: Sequence[int]) -> list[Answer]:
        """One answer to each of questions that nothing is learnt from; the same random numbers at any time.

        Args:
            numbers: of the questions.
        """
        with self._asking():
            return self._answers(questions, numbers, "held out", each=1)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """The policy as it is when it answers: no gradients, and products as in training."""
        device = self.policy.embed_tokens.weight.device.type
        was_training = self.policy.training
        self.policy.eval()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            yield
        self.policy.train(was_training)

    def _answers(
        self, questions: Sequence[Question], numbers: Sequence[int], purpose: str, each: int | None = None
    ) -> list[Answer]:
        """All answers to the first question, then to the second, and so on."""
        if not questions:
            return []
        config, stop_ids = self.config, self.tokenizer.stop_ids
        each = each or config.per_prompt
        prompts = [question.prompt_ids for question in questions]
        longest = min(max(map(len, prompts)) + config.max_new_tokens, self.context)
        with self.phases("sample"):
            samples = self._refreshed().sample(
                prompts,
                max_new_tokens=config.max_new_tokens,
                stop_ids=stop_ids,
                samples=each,
                sampling=config.sampling.resolved(),
                seed=seed_for(self.seed, purpose),
                numbers=numbers,
                batch_size=max(self.max_tokens // longest, 1),
                context=self.context,
            )
        responses = [self._response(drawn) for drawn in samples]
        if self.judge is None:
            verdicts = [Verdict(0.0)] * len(responses)
        else:
            with self.phases("judge"):
                verdicts = self.judge([question for question in questions for _ in range(each)], responses)
        return list(map(Answer, samples, responses, verdicts))

    def _refreshed(self) -> Sampler:
        """The sampler with the policy's weights of now; made when the policy is where it is trained."""
        if self._sampler is None:
            self._sampler = Sampler(self.policy)
        else:
            self._sampler.refresh()
        return self._sampler

    def _response(self, drawn: Sample) -> Response:
        is_complete = bool(drawn.ids) and drawn.ids[-1] in self.tokenizer.stop_ids
        return Response(drawn.ids, self.tokenizer.decode(drawn.ids[:-1] if is_complete else drawn.ids), is_complete)


def logps_by_token(
    model: Transformer, prompts: Sequence[list[int]], responses: Sequence[Sequence[list[int]]], max_tokens: int
) -> list[list[np.ndarray]]:
    """Log-probability of every token of every response, in nats, float32; ordered as the responses are.

    Args:
        max_tokens: of a pass; a prompt with its responses stays together.
    """
    device = model.embed_tokens.weight.device
    lengths = [len(prompt) + sum(map(len, group)) for prompt, group in zip(prompts, responses, strict=True)]
    found: list[list[np.ndarray]] = [[] for _ in prompts]
    for share in share_out(lengths, 1, max_tokens):
        if not share:
            continue
        batch = SegmentBatch.from_groups([prompts[i] for i in share], [responses[i] for i in share])
        logps = token_logps(model, batch.to(device))[batch.target_mask.to(device)].float().cpu().numpy()
        ends = np.cumsum([len(ids) for i in share for ids in responses[i]])[:-1]
        pieces = iter(np.split(logps, ends))
        for i in share:
            found[i] = [next(pieces) for _ in responses[i]]
    return found


def recorded(answer: Answer, sampled_logps: np.ndarray, reference_logps: np.ndarray) -> Drawn:
    """An answer as it is recorded."""
    response, verdict = answer.response, answer.verdict
    return Drawn(
        response.ids,
        response.text,
        response.is_complete,
        verdict.score,
        verdict.parts,
        np.array(answer.sample.logps, np.float32),
        sampled_logps,
        reference_logps,
    )


def known(question: Question) -> dict[str, str]:
    """What is known of a question, as it is recorded."""
    return {name: value for name, value in vars(question).items() if name != "prompt_ids" and value is not None}


def seed_for(seed: int, purpose: str) -> int:
    """The engine's seed: responses drawn for different purposes share no random numbers."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest(), "big")
