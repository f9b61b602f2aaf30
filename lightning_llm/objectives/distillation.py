"""Distillation: next-token prediction where a teacher has a say, by what is kept of it or by itself in every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_llm.batch import SegmentBatch
from lightning_llm.losses.distillation import bucket_targets, from_stored, mix_targets, teacher_entropy
from lightning_llm.losses.likelihood import kl_divergence
from lightning_llm.models import Transformer
from lightning_llm.objectives.causal_lm import CausalLM
from lightning_llm.objectives.config import DistillationConfig
from lightning_llm.optimization.window import Count, LossSum

Taught = tuple[Tensor, Mapping[str, tuple[Tensor, Count]]]  # summed loss [], what is logged beside it


class Distillation(CausalLM):
    """One unit is one target token. Needs the columns of a `<stage>.teacher`, or for targets=full the teacher itself.

    Held-out rows are measured by their true labels alone, so that students of any teacher are comparable.
    """

    config: DistillationConfig

    def __init__(self, config: DistillationConfig, student: Transformer, teacher: Transformer | None = None):
        super().__init__(config, student)
        self.teacher = self.frozen(teacher)

    def held_out_loss(self, batch: SegmentBatch) -> LossSum:
        """Next-token prediction without the teacher."""
        return super().loss(batch)

    def loss(self, batch: SegmentBatch) -> LossSum:
        """The mixture of label and teacher, summed over the targets that count.

        Logs of top1 how often the teacher favours the label, of the others the divergence from it in nats (of top_k
        over its parts, and only where no label is mixed in) and how much of its mass the kept ids have.
        """
        hidden = self.model(batch)[batch.predictors]  # [N, d]
        taught = {"top1": self.favourite, "top_k": self.likeliest, "full": self.whole}[self.config.targets]
        loss, metrics = taught(batch, hidden, batch.target_mask.to(hidden.dtype))
        return LossSum(loss, sum(batch.target_counts), metrics)

    def favourite(self, batch: SegmentBatch, hidden: Tensor, counted: Tensor) -> Taught:
        """AFM: two targets a token, the label and what the teacher finds likeliest."""
        top1 = batch.columns["teacher_ids"][:, 0].long()
        ids, weights = mix_targets(batch.target_ids, top1, self.config.teacher_weight)
        loss = -self.model.log_likelihood(hidden, ids, target_weights=weights, token_weights=counted).sum()
        agrees = ((top1 == batch.target_ids) & batch.target_mask).sum()
        return loss, {"teacher/favours_label": (agrees, sum(batch.target_counts))}

    def likeliest(self, batch: SegmentBatch, hidden: Tensor, counted: Tensor) -> Taught:
        """Gemma 2 from what is kept: k targets, the label, and a bucket for the mass of all others."""
        config, count = self.config, sum(batch.target_counts)
        log_p = from_stored(batch.columns["teacher_logps"])  # [N, k + 2]
        ids, weights, tail = bucket_targets(
            batch.target_ids, batch.columns["teacher_ids"].long(), log_p, config.teacher_weight
        )
        loss = -self.model.log_likelihood(
            hidden,
            ids,
            target_weights=weights,
            token_weights=counted,
            tail_weight=tail,
            temperature=config.temperature,
        ).sum()
        with torch.no_grad():
            metrics = {"teacher/kept_mass": ((log_p[:, :-2].logsumexp(1).exp() * counted).sum(), count)}
            if config.teacher_weight == 1:
                metrics["kl/teacher"] = (loss.detach() - (teacher_entropy(log_p) * counted).sum(), count)
        return config.temperature**2 * loss, metrics

    def whole(self, batch: SegmentBatch, hidden: Tensor, counted: Tensor) -> Taught:
        """The teacher's whole distribution, asked now: two heads, a chunk of logits at a time."""
        assert self.teacher is not None, "targets=full brings its teacher"
        config, model, teacher = self.config, self.model, self.teacher.on(self.device)
        with torch.no_grad():
            of_teacher = teacher(batch)[batch.predictors]  # [N, e]
        divergence = kl_divergence(
            hidden,
            model.head_weight,
            of_teacher,
            # Rows beyond the tokenizer's ids are padding, and heads of one tokenizer may have more or fewer of them.
            # The student's own stay in: they are sampled from, so their mass has to go, as it does from what is kept.
            # What the teacher has beyond them no student could say: its distribution is that over ids of both.
            teacher.head_weight[: len(model.head_weight)],
            direction=config.direction,
            beta=config.beta,
            token_weights=counted,
            student_softcap=model.config.final_logit_softcapping,
            teacher_softcap=teacher.config.final_logit_softcapping,
            temperature=config.temperature,
        ).sum()
        loss = config.teacher_weight * config.temperature**2 * divergence
        if config.teacher_weight != 1:
            label = model.log_likelihood(hidden, batch.target_ids, token_weights=counted).sum()
            loss = loss - (1 - config.teacher_weight) * label
        return loss, {"kl/teacher": (divergence.detach(), sum(batch.target_counts))}
