"""Logits on a GPU in half precision: two kernels, which read them once for their sums and once for their gradient.

Of torch's operations the same takes a dozen passes over memory, most of them in float32. As in Liger's loss (Hsu et
al. 2024, arXiv 2410.10989, section 3.2) the gradient takes the logits' place; here targets may be several, with a
bucket for the rest, and the logits soft-capped.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from lightning_llm.losses.logits import grouped, sums_over_equals

ENTRIES = 4096  # of a row that a program has at hand
WARPS = 8
# no_type_check below: what wraps functions to check their types would hide the source that Triton reads


@triton.jit
@no_type_check
def _capped(x, softcap, temperature, HAS_CAP: tl.constexpr):
    if HAS_CAP:
        x = softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)  # softcap tanh(x / softcap)
    return x / temperature


@triton.jit
@no_type_check
def _sums(logits, tops, log_sums, vocabulary, softcap, temperature, HAS_CAP: tl.constexpr, ENTRIES: tl.constexpr):
    """One row [V] -> its largest entry and the log of its sum of exp(entry - largest); a hidden entry is -inf."""
    row = tl.program_id(0)
    begin = logits + row.to(tl.int64) * vocabulary
    top = float("-inf")
    total = 0.0
    for first in range(0, vocabulary, ENTRIES):
        columns = first + tl.arange(0, ENTRIES)
        x = tl.load(begin + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
        x = tl.where(x == float("-inf"), x, _capped(x, softcap, temperature, HAS_CAP))
        larger = tl.maximum(top, tl.max(x, 0))
        seen = tl.where(larger == float("-inf"), 0.0, larger)  # of hidden entries alone the sum is 0
        total = total * tl.exp(top - seen) + tl.sum(tl.exp(x - seen), 0)
        top = larger
    tl.store(tops + row, top)
    tl.store(log_sums + row, tl.log(total))


@triton.jit
@no_type_check
def _gradient(
    logits, tops, log_sums, factors, vocabulary, softcap, temperature, HAS_CAP: tl.constexpr, ENTRIES: tl.constexpr
):  # fmt: skip
    """Entries of one row to factor softmax (1 - tanh^2), in their place."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    place = logits + row.to(tl.int64) * vocabulary + columns
    x = tl.load(place, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
    capped = _capped(x, softcap, temperature, HAS_CAP)
    grad = tl.exp((capped - tl.load(tops + row)) - tl.load(log_sums + row)) * tl.load(factors + row)
    if HAS_CAP:
        tanh = capped * temperature / softcap
        grad = grad * (1 - tanh * tanh)
    tl.store(place, tl.where(x == float("-inf"), 0.0, grad).to(logits.dtype.element_ty), mask=columns < vocabulary)


class FusedLogits:
    """`logits.Logits` of plain logits [n, V] in half precision, as a product has left them."""

    def __init__(self, plain: Tensor, softcap: float | None, temperature: float):
        assert plain.is_contiguous(), "a product is"
        self.plain, self.softcap, self.temperature = plain, softcap, temperature
        self.options = {"HAS_CAP": softcap is not None, "ENTRIES": ENTRIES, "num_warps": WARPS}
        self.scalars = plain.shape[1], softcap or 1.0, temperature
        self.top, self.log_sum = (plain.new_empty(len(plain), 1, dtype=torch.float32) for _ in range(2))
        self.hidden: Tensor | None = None  # what stood where `hide_` has left nothing

    def at(self, ids: Tensor) -> Tensor:
        """As `Logits`."""
        chosen = self.plain.gather(1, ids).float()
        if self.softcap is not None:
            chosen = self.softcap * (chosen / self.softcap).tanh()
        return chosen / self.temperature

    def hide_(self, ids: Tensor) -> Tensor:
        """As `Logits`."""
        self.hidden = self.at(ids)
        self.plain.scatter_(1, ids, float("-inf"))
        return grouped(ids)[1]

    def sum_(self) -> tuple[Tensor, Tensor]:
        """As `Logits`."""
        with torch.cuda.device_of(self.plain):
            start = _sums[(len(self.plain),)]  # pyright: ignore[reportIndexIssue]
            start(self.plain, self.top, self.log_sum, *self.scalars, **self.options)
        return self.top, self.log_sum

    def gradient_(self, factors: Tensor, ids: Tensor, own: Tensor, added: Tensor) -> Tensor:
        """As `Logits`, in their type: what stands at an id is summed up before it is rounded."""
        of_ids = own + sums_over_equals(ids, added)
        if self.softcap is not None:
            chosen = self.at(ids) if self.hidden is None else self.hidden
            of_ids = of_ids * (1 - (chosen * self.temperature / self.softcap).square())
        with torch.cuda.device_of(self.plain):
            start = _gradient[  # pyright: ignore[reportIndexIssue]
                (len(self.plain), triton.cdiv(self.plain.shape[1], ENTRIES))
            ]
            start(self.plain, self.top, self.log_sum, factors.float().contiguous(), *self.scalars, **self.options)
        return self.plain.scatter_(1, ids, of_ids.to(self.plain.dtype))
