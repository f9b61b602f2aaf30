"""The loss of next-token prediction: hidden states and targets in, one sum out. Nothing is averaged here."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_llm.losses.likelihood import token_log_likelihood


def causal_lm_loss(
    hidden: Float[Tensor, "targets width"],
    weight: Float[Tensor, "vocabulary width"],
    target_ids: Int[Tensor, "targets"],
    target_mask: Bool[Tensor, "targets"],
    *,
    softcap: float | None = None,
) -> Float[Tensor, ""]:
    """Negative log-likelihood of the targets that count (Radford et al. 2018, equation 1).

    With p = softmax of the capped logits at the token before each target y:
        loss = -sum over targets of mask log p(y)

    Pre-training counts every target, supervised fine-tuning those that the assistant says.

    Args:
        hidden: at the token before each target, after the final norm.
        weight: the head; may be the embedding as well (tied).
        target_ids: valid ids also where the mask is False.
        target_mask: False where a target is not to be learnt; nothing is computed there.
        softcap: logits are held between -softcap and softcap (Gemma 2, arXiv 2408.00118, section 2).

    Returns:
        A sum in nats, which whoever takes the step divides by its number of targets. As the gradients are made in the
        forward pass, it may be scaled as a whole only.
    """
    counted = target_mask.to(hidden.dtype)
    return -token_log_likelihood(hidden, weight, target_ids, token_weights=counted, softcap=softcap).sum()
