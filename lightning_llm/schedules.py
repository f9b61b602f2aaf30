"""What changes over a stage, as functions of consumed tokens: learning rate, batch, context. No state, no torch."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_llm.optimization.config import LearningRateConfig

Ramp: TypeAlias = list[dict[str, Any]]  # [{"at": tokens, "value": ...}, ...], piecewise constant, the first at 0


@dataclass(frozen=True)
class Progress:
    """How far a stage is. Schedules, data and logging are functions of it; nobody reads the trainer's own counters."""

    tokens: int = 0  # nominal: what the batch schedule says, not what the documents at hand add up to
    samples: int = 0  # rows
    steps: int = 0  # optimizer steps


def as_ramp(value: Any) -> Ramp:
    """A ramp from a plain number (one entry at 0) or from a list of {at, value}.

    Raises:
        ValueError: an entry has other keys, the first is not at 0, or they do not ascend.
    """
    if not isinstance(value, list | tuple):
        return [{"at": 0, "value": value}]
    for entry in value:
        if not isinstance(entry, dict):
            raise ValueError(f"an entry of a ramp has the keys at and value, got {entry!r}")
    ramp = [dict(entry) for entry in value]
    for entry in ramp:
        if set(entry) != {"at", "value"}:
            raise ValueError(f"an entry of a ramp has the keys at and value, got {sorted(entry)}")
    starts = [entry["at"] for entry in ramp]
    if not ramp or starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts)):
        raise ValueError(f"a ramp starts at 0 and ascends, got {starts}")
    return ramp


def ramp_value(ramp: Ramp, at: float) -> Any:
    """The value of the last entry that starts at or before `at`."""
    return ramp[max(bisect.bisect_right(ramp, at, key=lambda entry: entry["at"]) - 1, 0)]["value"]


class BatchPlan:
    """Which nominal tokens each optimizer step consumes: step t takes [boundary(t), boundary(t + 1)).

    A step's size is the ramp's value at its first token. The last step takes what is left of the total if that is at
    least half a batch, otherwise the step before it takes that too. Closed form: no step is visited to answer.
    """

    def __init__(self, batch_ramp: Ramp, total_tokens: int):
        self.total_tokens = int(total_tokens)
        self._pieces: list[tuple[int, int, int]] = []  # (first step, tokens before it, tokens of each step)
        step = start = 0
        ends = [*(int(entry["at"]) for entry in batch_ramp[1:]), self.total_tokens]
        for entry, end in zip(batch_ramp, ends, strict=True):
            size = int(entry["value"])
            if size < 1:
                raise ValueError(f"a batch has at least one token, got {entry['value']}")
            count = math.ceil((min(end, self.total_tokens) - start) / size)
            if count <= 0:  # a step of the piece before reaches over this one
                continue
            self._pieces.append((step, start, size))
            step, start = step + count, start + count * size
        self.steps = step
        if step > 1:
            last = self._nominal(step - 1)
            size = self._pieces[bisect.bisect_right(self._pieces, step - 1, key=lambda piece: piece[0]) - 1][2]
            if 2 * (self.total_tokens - last) < size:
                self.steps -= 1

    def _nominal(self, step: int) -> int:
        first, start, size = self._pieces[bisect.bisect_right(self._pieces, step, key=lambda piece: piece[0]) - 1]
        return start + (step - first) * size

    def boundary(self, step: int) -> int:
        """Tokens consumed before `step`; the total for the number of steps and beyond."""
        if step >= self.steps:
            return self.total_tokens
        return self._nominal(step)

    def step_at(self, tokens: float) -> int:
        """The first step that begins at or after `tokens` (an evaluation due at `tokens` comes before it)."""
        return bisect.bisect_left(range(self.steps), tokens, key=self.boundary)


def _warmed_up(tokens: float, peak: float, warmup: float) -> float:
    return peak * max(tokens, 0.0) / warmup


def _share(tokens: float, begin: float, end: float) -> float:
    if end <= begin:  # no time to decay in
        return 0.0
    return 1.0 if tokens >= end else max(tokens - begin, 0.0) / (end - begin)


def constant(tokens: float, *, peak: float, warmup: float = 0.0) -> float:
    """Linear from 0 to `peak` over the first `warmup` tokens, then `peak`."""
    return _warmed_up(tokens, peak, warmup) if tokens < warmup else peak


def linear(tokens: float, *, peak: float, final: float, warmup: float, total: float) -> float:
    """Linear from 0 to `peak` over the first `warmup` tokens, then linear to `final` at `total`; constant beyond."""
    if tokens < warmup:
        return _warmed_up(tokens, peak, warmup)
    return peak + (final - peak) * _share(tokens, warmup, total)


def cosine(tokens: float, *, peak: float, final: float, warmup: float, total: float) -> float:
    """Linear from 0 to `peak` over the first `warmup` tokens, half a cosine to `final` at `total`; constant beyond."""
    if tokens < warmup:
        return _warmed_up(tokens, peak, warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * _share(tokens, warmup, total)))


def wsd(tokens: float, *, peak: float, final: float, warmup: float, total: float, decay_share: float) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395).

    Linear from 0 to `peak` over the first `warmup` tokens, `peak` up to the last `decay_share` of `total`, then linear
    to `final` at `total` (linear as in Haegele et al. 2024, arXiv 2405.18392); constant beyond.
    """
    if tokens < warmup:
        return _warmed_up(tokens, peak, warmup)
    return peak + (final - peak) * _share(tokens, max(warmup, total * (1 - decay_share)), total)


_FINAL_SHARE = {"constant": 1.0, "linear": 0.0, "cosine": 0.1, "wsd": 0.0}  # of the peak, where none is given


def final_learning_rate(config: LearningRateConfig) -> float:
    """The learning rate at the end: as given, otherwise a share of the peak, the schedule's own if none is given.

    Raises:
        ValueError: the peak is that of the stage before, which nobody has looked up.
    """
    share = _FINAL_SHARE[config.schedule] if config.final_share is None else config.final_share
    return share * peak_learning_rate(config) if config.final is None else config.final


def peak_learning_rate(config: LearningRateConfig) -> float:
    """The highest learning rate. Where the stage before decides it, the plan looks it up.

    Raises:
        ValueError: nobody has.
    """
    if config.peak is None:
        raise ValueError("peak has no value: the learning rate at the end of the stage before has to be put in first")
    return config.peak


def warmup_tokens(config: LearningRateConfig, total: float) -> float:
    """Length of the warm-up in tokens. Steps are turned into tokens by the plan, which knows the batch ramp."""
    given = [v for v in (config.warmup_tokens, config.warmup_steps, config.warmup_share) if v is not None]
    if len(given) > 1:
        raise ValueError("at most one of warmup_tokens, warmup_steps and warmup_share")
    if config.warmup_steps is not None:
        raise ValueError("warmup_steps has to be turned into warmup_tokens first (BatchPlan.boundary)")
    if config.warmup_share is not None:
        return config.warmup_share * total
    return config.warmup_tokens or 0.0


def learning_rate(config: LearningRateConfig, tokens: float, total: float) -> float:
    """Learning rate of the step after which `tokens` of the stage's `total` are consumed.

    A stretched schedule ends after `stretch` times as many tokens: the stage is its beginning, warm-up included.

    Raises:
        ValueError: more than one warm-up, or one given in steps; no peak.
    """
    peak, final, warmup = peak_learning_rate(config), final_learning_rate(config), warmup_tokens(config, total)
    total *= config.stretch
    if config.schedule == "constant":
        return constant(tokens, peak=peak, warmup=warmup)
    if config.schedule == "wsd":
        return wsd(tokens, peak=peak, final=final, warmup=warmup, total=total, decay_share=config.decay_share)
    decays: dict[str, Callable[..., float]] = {"linear": linear, "cosine": cosine}
    return decays[config.schedule](tokens, peak=peak, final=final, warmup=warmup, total=total)
