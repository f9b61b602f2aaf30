"""What a student is to predict where a teacher has a say: targets for the vocabulary function, and as they are kept.

A mixture of the true label and the teacher's distribution is a list of ids with weights, whatever the teacher's share.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Integer, Num
from torch import Tensor

STEPS_PER_NAT = 16  # of log-probabilities in 8 bits: they reach down to -15.9 nats, each within 1/32


def mix_targets(
    labels: Int[Tensor, "targets"], teacher_top1: Integer[Tensor, "targets"], teacher_weight: float
) -> tuple[Int[Tensor, "targets 2"], Float[Tensor, "targets 2"]]:
    """The label and the teacher's favourite as two targets (AFM on-device, arXiv 2407.21075, core pre-training).

    With a the teacher's weight, k its likeliest id and x the label:
        loss = -(1 - a) log p(x) - a log p(k)

    Args:
        labels: true next tokens.
        teacher_top1: the teacher's likeliest ids. Where they are the labels, the weights add up.
        teacher_weight: in [0, 1]; AFM takes 0.9.

    Returns:
        ids and weights for `token_log_likelihood`, the label first.

    Raises:
        ValueError: the weight is out of range.
    """
    _refuse_weight(teacher_weight)
    ids = torch.stack((labels, teacher_top1.to(labels.dtype)), dim=1)
    return ids, torch.tensor((1 - teacher_weight, teacher_weight), device=labels.device).expand(ids.shape)


class BucketTargets(NamedTuple):
    """What `token_log_likelihood` is asked for: k + 1 ids with weights, and the weight of all others together."""

    ids: Tensor  # [N, k + 1], the label first
    weights: Tensor  # [N, k + 1]
    tail: Tensor  # [N]


def bucket_targets(
    labels: Int[Tensor, "targets"],
    teacher_ids: Integer[Tensor, "targets k"],
    log_p: Float[Tensor, "targets k_and_two"],
    teacher_weight: float,
) -> BucketTargets:
    """The label and a teacher's distribution in k + 2 parts: its likeliest ids, the label, all others in one bucket.

    With a the teacher's weight, p its probabilities, K its likeliest ids with the label, x the label, q the student's:
        loss = -(1 - a) log q(x) - a [ sum over K of p log q + (1 - p(K)) log (1 - q(K)) ]

    The bucket keeps the teacher's mass outside K, so that nothing is sharpened; within it the student is free. What is
    left of the divergence is at most the whole one (data-processing inequality), and its slopes on K are the whole
    one's: q - p.

    Args:
        labels: true next tokens.
        teacher_ids, log_p: of `top_log_probabilities`; rounded ones are made to add up to 1 again.
        teacher_weight: in [0, 1]; 1 is Gemma 2's, which knows no label.

    Raises:
        ValueError: the weight is out of range.
    """
    _refuse_weight(teacher_weight)
    shares = teacher_weight * log_p.softmax(1)  # of the k ids, the label, the rest
    k = teacher_ids.shape[1]
    label = shares[:, k] + (1 - teacher_weight)
    ids = torch.cat((labels[:, None], teacher_ids.to(labels.dtype)), dim=1)
    return BucketTargets(ids, torch.cat((label[:, None], shares[:, :k]), dim=1), shares[:, k + 1])


def teacher_entropy(log_p: Float[Tensor, "targets parts"]) -> Float[Tensor, "targets"]:
    """Of the teacher's distribution in parts, in nats: its cross-entropy less this is the divergence over the parts."""
    log_p = log_p.log_softmax(1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(1)  # 0 log 0 is 0


def _refuse_weight(teacher_weight: float) -> None:
    if not 0 <= teacher_weight <= 1:
        raise ValueError(f"teacher_weight must lie in [0, 1], got {teacher_weight}")


# ---- as they are kept on disk ----


def to_stored(log_p: Float[Tensor, "*shape"], precision: str) -> Num[Tensor, "*shape"]:
    """Log-probabilities in 2 bytes or in 1.

    Args:
        precision: float16, or uint8: sixteenths of a nat below 0, 255 for all that is less than -15.9.
    """
    if precision == "uint8":
        return log_p.mul(-STEPS_PER_NAT).round_().clamp_(0, 255).to(torch.uint8)
    return log_p.to(torch.float16)


def from_stored(stored: Num[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Log-probabilities of what `to_stored` made, in nats, float32."""
    return stored.float().div_(-STEPS_PER_NAT) if stored.dtype == torch.uint8 else stored.float()
