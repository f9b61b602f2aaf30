"""All that has a vocabulary axis: likelihoods of targets, divergence from a teacher, some tokens at a time.

All logits never exist at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_llm.losses.logits import ComposedLogits, Logits, exponentiate_, kernels_run, log_softmax_

DIRECTIONS = ("forward", "reverse", "jensen_shannon")  # of a divergence between teacher and student


def token_log_likelihood(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocabulary width"],
    target_ids: Int[Tensor, "tokens"] | Int[Tensor, "tokens k"],
    target_weights: Float[Tensor, "tokens k"] | None = None,
    *,
    token_weights: Float[Tensor, "tokens"] | None = None,
    tail_weight: Float[Tensor, "tokens"] | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Float[Tensor, "tokens"]:
    """Log-likelihood of each token's target, with exact gradients for `hidden` and `weight`.

    With l = softcap tanh(hidden weight^T / softcap) / temperature and p = softmax(l), of each token
        token_weight (sum_k target_weight_k log p(target_k) + tail_weight log(1 - sum_k p(target_k)))

    One target is a causal language model's, its negative sum over the tokens the training loss of pre-training and
    SFT; (1 - a, a) on the label and a teacher's favourite is AFM's distillation; the k likeliest of a teacher and its
    tail weight are Gemma 2's from a cache.

    The gradients come about in one of two ways. With `token_weights` they are made in the forward pass, where the
    logits are at hand; that is only right if the caller sums the result and scales it as a whole. Without them the
    backward pass computes the logits again, and each token may have a factor of its own, as in DPO.

    Args:
        hidden: what predicts, after the final norm. Gradients flow to it and to `weight`, to nothing else.
        weight: the head; may be the embedding as well (tied). Half precision is summed up in float32.
        target_ids: one or k targets per token; ids have to be valid also where the weight is 0.
        target_weights: of each of the k targets, 1 if not given.
        token_weights: factor of each token's result; where it is 0 nothing is computed.
        tail_weight: of the bucket that all other ids make up, from the log-sum-exp of their logits.
        softcap: logits are held between -softcap and softcap (Gemma 2, arXiv 2408.00118, section 2).
        temperature: divides the capped logits, > 0.
        chunk: tokens at a time; on a CPU 256, or fewer for a large vocabulary, if not given.

    Returns:
        In nats, float32 or better, already multiplied by `token_weights`.

    Raises:
        ValueError: an argument's range or shape is wrong.
        RuntimeError: in the backward pass, with `token_weights`, if tokens come back with different factors.
    """
    count, vocabulary = len(hidden), len(weight)
    ids = target_ids if target_ids.ndim == 2 else target_ids[:, None]
    _refuse_ranges(temperature, (softcap,), chunk)
    if len(ids) != count or (target_weights is not None and target_weights.shape != ids.shape):
        raise ValueError("target_ids has a row per row of hidden, and target_weights the same shape")
    for name, given in (("token_weights", token_weights), ("tail_weight", tail_weight)):
        if given is not None and given.shape != (count,):
            raise ValueError(f"{name} has one entry per row of hidden, got {tuple(given.shape)} for {count}")
    if tail_weight is not None and ids.shape[1] >= vocabulary:
        raise ValueError(f"no id is left for the tail: {ids.shape[1]} targets of {vocabulary}")

    products = _product_dtype(hidden, weight)
    exact = torch.promote_types(products, torch.float32)
    targets = _Targets(
        ids.long(),
        torch.ones_like(ids, dtype=exact) if target_weights is None else target_weights.detach().to(exact),
        None if tail_weight is None else tail_weight.detach().to(exact),
    )
    head = _Head(products, exact, softcap, temperature, chunk or _default_chunk(weight))
    if chunk is None and head.can_fuse(weight, targets):
        head = replace(head, chunk=2 * head.chunk)  # in half precision they are as many bytes
    return _differentiable(head, hidden, weight, targets, token_weights)


def kl_divergence(
    student_hidden: Float[Tensor, "tokens student_width"],
    student_weight: Float[Tensor, "student_vocabulary student_width"],
    teacher_hidden: Float[Tensor, "tokens teacher_width"],
    teacher_weight: Float[Tensor, "teacher_vocabulary teacher_width"],
    *,
    direction: str = "forward",
    beta: float = 0.5,
    token_weights: Float[Tensor, "tokens"] | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Float[Tensor, "tokens"]:
    """Divergence of a student's next-token distribution from its teacher's, with exact gradients for the student.

    With q and p the softmax of the student's and of the teacher's capped logits over the temperature, of each token
        forward         KL(p || q) = sum p (log p - log q)
        reverse         KL(q || p) = sum q (log q - log p)
        jensen_shannon  beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
    times its token_weight. Forward is Gemma 2's distillation (arXiv 2408.00118, section 3.2) less the teacher's
    entropy, reverse MiniLLM's (arXiv 2306.08543, equation 1), the last GKD's (arXiv 2306.13649, equation 1). The slopes
    for the student's logits are q - p, q (log q - log p - KL) and q (g - sum q g) with g = (1 - beta) log (q / m).
    Where the student has more ids, p is 0 of those that the teacher lacks: q goes to 0 there as well. Reverse would be
    infinite, so that it wants heads of one size.

    Two heads of any widths; both logits exist for one chunk at a time. How the gradients come about with and without
    `token_weights` is told at `token_log_likelihood`; nothing flows to the teacher.

    Args:
        student_hidden, teacher_hidden: what predicts, after the final norms, of the same tokens.
        student_weight, teacher_weight: the heads. The teacher's ids are the first of the student's, or all of them.
        direction: forward | reverse | jensen_shannon.
        beta: of jensen_shannon, in (0, 1): towards 0 its slopes are forward's times beta, towards 1 reverse's times
            1 - beta.
        token_weights: factor of each token's divergence; where it is 0 nothing is computed.
        student_softcap, teacher_softcap: logits are held between -softcap and softcap.
        temperature: divides the capped logits of both, > 0.
        chunk: tokens at a time; half as many as of `token_log_likelihood` if not given.

    Returns:
        In nats, float32 or better, at least 0 but for rounding, already multiplied by `token_weights`.

    Raises:
        ValueError: an argument's range or shape is wrong.
        RuntimeError: in the backward pass, with `token_weights`, if tokens come back with different factors.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie in (0, 1), got {beta}")
    _refuse_ranges(temperature, (student_softcap, teacher_softcap), chunk)
    of_student, of_teacher = len(student_weight), len(teacher_weight)
    if of_teacher > of_student:
        raise ValueError(f"the teacher has {of_teacher} ids, the student {of_student}; give so many rows of its head")
    if direction == "reverse" and of_teacher < of_student:
        raise ValueError(
            f"the student has {of_student} ids, the teacher {of_teacher}: the reverse divergence is infinite"
        )
    if len(teacher_hidden) != len(student_hidden):
        raise ValueError("teacher_hidden has a row per row of student_hidden")
    if token_weights is not None and token_weights.shape != (len(student_hidden),):
        raise ValueError(f"token_weights has one entry per row of student_hidden, got {tuple(token_weights.shape)}")
    products = _product_dtype(student_hidden, student_weight)
    products_of_teacher = _product_dtype(teacher_hidden, teacher_weight)
    exact = torch.promote_types(torch.promote_types(products, products_of_teacher), torch.float32)
    chunk = chunk or max(_default_chunk(student_weight) // 2, 1)  # there are two logits for each id
    student = _Head(products, exact, student_softcap, temperature, chunk)
    teacher = _Teacher(
        teacher_hidden.detach(),
        teacher_weight.detach().to(products_of_teacher),
        replace(student, products=products_of_teacher, softcap=teacher_softcap),
        direction,
        beta,
    )
    return _differentiable(student, student_hidden, student_weight, teacher, token_weights)


@torch.no_grad()
def top_log_probabilities(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocabulary width"],
    label_ids: Int[Tensor, "tokens"],
    k: int,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k_and_two"]]:
    """A distribution over the vocabulary in k + 2 parts: its likeliest ids, the label, and all others together.

    A teacher's, kept for a student (`losses/distillation.py`). The label stands apart, so that a mixture with it is
    exact whether or not it is among the likeliest.

    Args:
        hidden, weight, softcap, temperature, chunk: as of `token_log_likelihood`; no gradients.
        label_ids: what came next.
        k: how many of the likeliest, up to all ids.

    Returns:
        ids, the likeliest first; and natural logarithms of the k + 2 probabilities, which add up to 1: of the ids, of
        the label (-inf where it is one of them), of the rest (-inf where there is none).

    Raises:
        ValueError: an argument's range is wrong.
    """
    _refuse_ranges(temperature, (softcap,), chunk)
    if not 1 <= k <= len(weight):
        raise ValueError(f"k must lie in [1, {len(weight)}], got {k}")
    products = _product_dtype(hidden, weight)
    head = _Head(
        products, torch.promote_types(products, torch.float32), softcap, temperature, chunk or _default_chunk(weight)
    )
    return head.likeliest(hidden, weight, label_ids.long(), k)


def _differentiable(
    head: _Head, hidden: Tensor, weight: Tensor, targets: _Targets | _Teacher, token_weights: Tensor | None
) -> Tensor:
    """What `head` makes of the targets [N], in the one or the other way to the gradients, if any are wanted."""
    factors = None if token_weights is None else token_weights.detach().to(head.exact)
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        return head.evaluate(hidden, weight, targets, factors).values
    if factors is None:
        return _GradientInBackward.apply(hidden, weight, targets, head)
    return _GradientInForward.apply(hidden, weight, targets, factors, head)


def _refuse_ranges(temperature: float, softcaps: Sequence[float | None], chunk: int | None) -> None:
    if temperature <= 0 or any(softcap is not None and softcap <= 0 for softcap in softcaps):
        given = " and ".join(str(softcap) for softcap in softcaps)
        raise ValueError(f"temperature and softcap must be positive, got {temperature} and {given}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What a matrix product would take. Inside an autograd function autocast has to be asked for."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _default_chunk(weight: Tensor) -> int:
    vocabulary = len(weight)
    if weight.device.type == "cpu":
        # from 256 tokens on the products run at full rate (V = 2,048 to 49,152); 2^24 logits are 64 MiB
        return max(1, min(256, 2**24 // vocabulary))
    return max(1, 2**27 // vocabulary)  # a GPU wants larger products; 512 MiB in float32


@dataclass(frozen=True)
class _Targets:
    ids: Tensor  # [n, k] int64
    weights: Tensor  # [n, k]
    tail: Tensor | None  # [n]

    def __getitem__(self, rows: Tensor) -> _Targets:
        return _Targets(self.ids[rows], self.weights[rows], None if self.tail is None else self.tail[rows])

    def compare(self, logits: Logits) -> _Likelihood:
        """Uses up logits [n, V]."""
        return _Likelihood(logits, self)


@dataclass(frozen=True)
class _Teacher:
    """The dense target of each token: a distribution that comes of a head of its own."""

    hidden: Tensor  # [n, e]
    matrix: Tensor  # [U, e], U at most the student's V
    head: _Head
    direction: str
    beta: float

    def __getitem__(self, rows: Tensor) -> _Teacher:
        return replace(self, hidden=self.hidden[rows])

    def compare(self, logits: Logits) -> _Divergence:
        """Uses up the student's logits [n, V]."""
        assert isinstance(logits, ComposedLogits), "they are not fused"
        states, students = self.hidden.to(self.head.products), logits.logits
        own = self.head._logits(states, self.matrix, students.new_empty(len(students), len(self.matrix)))  # [n, U]
        return _Divergence(logits, own, self.direction, self.beta)


class _Evaluation(NamedTuple):
    values: Tensor  # [N]
    grad_hidden: Tensor | None  # [N, d]
    grad_weight: Tensor | None  # [V, d]


@dataclass(frozen=True)
class _Head:
    """The one loop over chunks. What is as large as a chunk's logits is worked on in place, in buffers made once."""

    products: torch.dtype  # of the matrix products
    exact: torch.dtype  # of everything else
    softcap: float | None
    temperature: float
    chunk: int

    def evaluate(
        self,
        hidden: Tensor,  # [N, d]
        weight: Tensor,  # [V, d]
        targets: _Targets | _Teacher,
        factors: Tensor | None = None,  # [N], 1 if not given; a token whose factor is 0 costs nothing
        wanted: Sequence[bool] = (False, False),  # the gradients for hidden and weight?
    ) -> _Evaluation:
        """Log-likelihoods or divergences times factors and, where wanted, the gradients of their sum."""
        values = hidden.new_zeros(len(hidden), dtype=self.exact)
        grad_hidden = torch.zeros_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=self.exact) if wanted[1] else None
        if factors is None:
            factors = torch.ones_like(values)
            rows = torch.arange(len(values), device=hidden.device)
        else:
            rows = factors.nonzero().squeeze(1)
        matrix = weight.to(self.products)
        logits_of = self._fused if self.can_fuse(weight, targets) else self._composed(weight, len(rows), any(wanted))

        with torch.autocast(hidden.device.type, enabled=False):
            for part in rows.split(self.chunk):
                states = hidden[part].to(self.products)  # [n, d]
                compared = targets[part].compare(logits_of(states, matrix))
                values[part] = compared.values * factors[part]
                if not any(wanted):
                    del compared  # before the next chunk's logits are there
                    continue
                grad = compared.grad_logits(factors[part] / self.temperature).to(self.products)  # [n, V]
                if grad_hidden is not None:
                    grad_hidden[part] = (grad @ matrix).to(hidden.dtype)
                if grad_weight is not None:
                    _add_product_(grad_weight, grad.T, states)
                del compared, grad
        return _Evaluation(values, grad_hidden, grad_weight)

    def can_fuse(self, weight: Tensor, targets: _Targets | _Teacher) -> bool:
        """Whether the logits of these targets are met by the kernels of `fused_logits`."""
        is_half = self.products.itemsize == 2 and self.exact == torch.float32
        return weight.is_cuda and is_half and isinstance(targets, _Targets) and kernels_run()

    def _fused(self, states: Tensor, matrix: Tensor) -> Logits:
        from lightning_llm.losses.fused_logits import FusedLogits

        return FusedLogits(states @ matrix.T, self.softcap, self.temperature)

    def _composed(self, weight: Tensor, count: int, has_gradient: bool) -> Callable[[Tensor, Tensor], ComposedLogits]:
        """Logits of a chunk's states, in buffers that all chunks share."""
        buffer = torch.empty(min(self.chunk, count), len(weight), dtype=self.exact, device=weight.device)
        slopes_buffer = torch.empty_like(buffer) if self.softcap and has_gradient else None

        def logits_of(states: Tensor, matrix: Tensor) -> ComposedLogits:
            logits = self._logits(states, matrix, buffer[: len(states)])
            slopes = None if slopes_buffer is None else self._slopes(logits, slopes_buffer[: len(states)])
            return ComposedLogits(logits, slopes)

        return logits_of

    def likeliest(self, hidden: Tensor, weight: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """`top_log_probabilities`: ids [N, k] and log-probabilities [N, k + 2]."""
        ids = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
        log_p = torch.empty(len(hidden), k + 2, dtype=self.exact, device=hidden.device)
        matrix = weight.to(self.products)
        buffer = torch.empty(min(self.chunk, len(hidden)), len(weight), dtype=self.exact, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, len(hidden), self.chunk):
                part = slice(first, first + self.chunk)
                states = hidden[part].to(self.products)
                logits = self._logits(states, matrix, buffer[: len(states)])
                chosen, ids[part] = logits.topk(k, dim=1)
                label = labels[part, None]
                listed = (ids[part] == label).any(1, keepdim=True)
                chosen = torch.cat((chosen, logits.gather(1, label).masked_fill(listed, float("-inf"))), dim=1)
                top, log_sum = exponentiate_(logits)  # now exp(logits - top)
                rest = logits.scatter_(1, ids[part], 0.0).scatter_(1, label, 0.0).sum(1, keepdim=True).log()
                log_p[part] = torch.cat((chosen - top, rest), dim=1) - log_sum
        return ids, log_p

    def _logits(self, states: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
        if self.products == self.exact:
            torch.mm(states, matrix.T, out=out)
        else:
            out.copy_(states @ matrix.T)
        if self.softcap:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out if self.temperature == 1 else out.div_(self.temperature)

    def _slopes(self, logits: Tensor, out: Tensor) -> Tensor:
        """Derivative of the capped logits for the plain ones, 1 - tanh^2."""
        assert self.softcap
        return torch.mul(logits, self.temperature / self.softcap, out=out).square_().neg_().add_(1)


class _Likelihood:
    """Log-likelihoods `values` [n] of a chunk. Uses up its logits [n, V]: their gradient takes their place."""

    def __init__(self, logits: Logits, targets: _Targets):
        self.logits, self.targets = logits, targets
        self.log_tail = None  # log-probability of all ids that are no target [n, 1]
        chosen = logits.at(targets.ids)  # [n, k]
        if targets.tail is None:
            top, log_sum = logits.sum_()
        else:
            is_one = logits.hide_(targets.ids)  # of those that are listed twice
            tail_top, tail_log_sum = logits.sum_()
            top = torch.maximum(chosen.amax(1, keepdim=True), tail_top)
            listed = (chosen - top).exp().mul_(is_one).sum(1, keepdim=True)
            log_sum = (listed + (tail_top - top + tail_log_sum).exp()).log_()
            self.log_tail = (tail_top - top) + (tail_log_sum - log_sum)
        self.log_p = (chosen - top) - log_sum  # differences first: of large logits they are exact
        self.values = (targets.weights * self.log_p).sum(1)
        if targets.tail is not None and self.log_tail is not None:
            self.values += targets.tail * self.log_tail.squeeze(1)

    def grad_logits(self, factors: Tensor) -> Tensor:
        """Gradient of (factors * values).sum() for the logits before their cap [n, V].

        With p = softmax, w the targets' weights, t that of the tail and P its probability it is
            w_v - (sum w + t) p_v at a target, and
            (t / P - (sum w + t)) p_v elsewhere, where p_v / P is the softmax over the tail: nothing overflows.
        """
        targets, factors = self.targets, factors[:, None]
        total = targets.weights.sum(1, keepdim=True)
        elsewhere = -total
        if targets.tail is not None and self.log_tail is not None:
            tail = targets.tail[:, None]
            total = total + tail
            elsewhere = tail - total * self.log_tail.exp()
        own, added = -total * self.log_p.exp() * factors, targets.weights * factors
        return self.logits.gradient_(elsewhere * factors, targets.ids, own, added)


class _Divergence:
    """Divergences `values` [n] of a chunk. Uses up the student's logits [n, V] and the teacher's [n, U].

    Of ids from U on, which the teacher has not, p is 0: what is multiplied with it is left out, not computed.
    """

    def __init__(self, student: ComposedLogits, teacher: Tensor, direction: str, beta: float):
        self.capped_ = student.capped_
        log_q, log_p = log_softmax_(student.logits), log_softmax_(teacher)
        self.ids_of_teacher = log_p.shape[1]  # U
        common = log_q[:, : self.ids_of_teacher]
        self.p = self.slopes = None
        if direction == "forward":
            self.p = log_p.exp()
            self.values = log_p.sub_(common).mul_(self.p).sum(1)
            self.q = log_q.exp_()
            return
        self.q, self.slopes = log_q.exp(), log_q  # for the probabilities q: up to a constant, which the softmax forgets
        if direction == "reverse":
            self.slopes.sub_(log_p)
            self.values = (self.q * self.slopes).sum(1)
            return
        log_m = torch.logaddexp(log_p + math.log(beta), common + math.log1p(-beta))
        common.sub_(log_m)  # a view: the slopes of these ids
        self.slopes[:, self.ids_of_teacher :] = -math.log1p(-beta)  # there m is (1 - beta) q
        self.slopes.mul_(1 - beta)
        of_teacher = log_m.neg_().add_(log_p).mul_(log_p.exp_()).sum(1)
        self.values = beta * of_teacher + (self.q * self.slopes).sum(1)

    def grad_logits(self, factors: Tensor) -> Tensor:
        """Gradient of (factors * values).sum() for the student's logits before their cap [n, V].

        Through the softmax, q (g - sum q g) of slopes g for q; of the forward direction, where g is -p / q, at once.
        """
        if self.p is not None:
            self.q[:, : self.ids_of_teacher].sub_(self.p)
            return self.capped_(self.q.mul_(factors[:, None]))
        assert self.slopes is not None, "of all other directions"
        mean = (self.q * self.slopes).sum(1, keepdim=True)
        return self.capped_(self.slopes.sub_(mean).mul_(self.q).mul_(factors[:, None]))


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, the sums of half-precision factors kept in the total's float32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


class _GradientInForward(torch.autograd.Function):
    """The logits are computed once. For a result that is summed and scaled as a whole."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: _Targets | _Teacher, factors: Tensor, head: _Head
    ) -> Tensor:
        """Weighted values [N] of hidden states [N, d] under a head [V, d], their gradients kept beside.

        Args:
            factors: [N], what each token's value is multiplied with.
        """
        values, *ctx.gradients = head.evaluate(hidden, weight, targets, factors, ctx.needs_input_grad[:2])
        ctx.save_for_backward(hidden, weight)
        ctx.targets, ctx.factors, ctx.head = targets, factors, head
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        """The gradients kept, times the one factor of all tokens; raises RuntimeError where there are several."""
        if len(grad) and grad.stride() != (0,) and not (grad == grad[0]).all():  # stride 0: the gradient of a sum
            raise RuntimeError(
                "with token_weights the gradient is made in the forward pass, so that the "
                "result may only be summed and scaled as a whole; leave token_weights out to treat tokens differently"
            )
        hidden, weight = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # handed on before: the graph is gone through a second time
            _, *gradients = ctx.head.evaluate(hidden, weight, ctx.targets, ctx.factors, ctx.needs_input_grad[:2])
        grad_hidden, grad_weight = gradients
        factor = grad[:1].sum()
        if grad_hidden is not None:
            grad_hidden.mul_(factor)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(factor).to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


class _GradientInBackward(torch.autograd.Function):
    """The logits are computed twice and never kept. For a result whose tokens get a factor each."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: _Targets | _Teacher, head: _Head) -> Tensor:
        """Values [N] of hidden states [N, d] under a head [V, d]."""
        ctx.save_for_backward(hidden, weight)
        ctx.targets, ctx.head = targets, head
        return head.evaluate(hidden, weight, targets).values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        """Gradients of hidden states [N, d] and head [V, d], from a factor of each token's own [N]."""
        hidden, weight = ctx.saved_tensors
        _, grad_hidden, grad_weight = ctx.head.evaluate(hidden, weight, ctx.targets, grad, ctx.needs_input_grad[:2])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None
