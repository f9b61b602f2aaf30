"""A step of generation as a CUDA graph: recorded once, then replayed by one call.

On a GPU a step of a few rows is a thousand small kernels, and the processor needs several times as long to start them
as they take. A graph starts them together, but does the same work on the same memory each time: so all rows are
computed, those of nobody too, and as many slots are read as the length that is recorded has. The longest text grows
through a few such lengths, each with a graph of its own.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lightning_llm.generation.cache import Cache, hide_empty, step
from lightning_llm.models.transformer import Transformer

SHORTEST = 128  # slots that the first graph reads, and steps between two graphs' at least
GRAPHS = 16  # of a cache, at most
FEWEST = 8  # steps of the longest response for which there is a graph: recording it takes as long as a few


def can_be_recorded(model: Transformer, cache: Cache, steps: int) -> bool:
    """Whether a step does nothing but start kernels of a GPU, and there are enough of them.

    Experts and dual chunks look at numbers on the way.
    """
    layers = range(model.config.num_hidden_layers)
    has_experts = any(model.config.has_experts(layer) for layer in layers)
    return cache.device.type == "cuda" and cache.dual_chunk is None and not has_experts and steps >= FEWEST


class RecordedStep:
    """`cache.decode` for as long as a cache lives. Off a GPU the same work is done and nothing is recorded."""

    def __init__(self, model: Transformer, cache: Cache):
        self.model, self.cache = model, cache
        self.inputs = torch.zeros(2, cache.rows, dtype=torch.int64, device=cache.device)  # tokens; where they go
        self.between = SHORTEST * -(-cache.positions // (SHORTEST * GRAPHS))  # slots by which graphs differ
        self.is_recordable = True
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by slots: the graph, and its hidden states

    def decode(self, tokens: Tensor) -> Tensor:
        """Compute one more token [B] of each row in use and add it to the cache; hidden states [B, d], which the next
        call overwrites."""
        lengths, count = self.cache.lengths, len(tokens)
        inputs = torch.zeros(self.inputs.shape, dtype=torch.int64)  # nobody's rows put a token of their own into slot 0
        inputs[0, :count], inputs[1, :count] = tokens, torch.tensor(lengths)
        self.inputs.copy_(inputs)
        longest = min(-(-(max(lengths) + 1) // self.between) * self.between, self.cache.positions)
        hidden = self._replay(longest) if self.cache.device.type == "cuda" else self._step(longest)
        self.cache.lengths = [length + 1 for length in lengths]
        return hidden[:count]

    def _step(self, longest: int) -> Tensor:
        tokens, positions = self.inputs
        dtype = self.model.embed_tokens.weight.dtype
        masks = {
            slots: hide_empty(positions + 1, min(longest, slots), dtype) for slots in set(self.cache.slots)
        }  # a ring that has gone round hides nothing
        return step(self.model, self.cache, tokens, positions, longest, masks)

    def _replay(self, longest: int) -> Tensor:
        if self.is_recordable and longest not in self.graphs:
            try:
                self.graphs[longest] = self._record(longest)
            except RuntimeError as error:  # something on the way waits for the GPU: no rule of ours has seen it
                self.is_recordable = False
                reason = str(error).splitlines()[0]
                warnings.warn(
                    f"steps of generation go kernel by kernel: no graph can be recorded ({reason})", stacklevel=2
                )
        if longest not in self.graphs:
            return self._step(longest)
        graph, hidden = self.graphs[longest]
        graph.replay()
        return hidden

    def _record(self, longest: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        now, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(now)
        with torch.cuda.stream(aside):  # once as it is: what libraries set up, and autocast's copies, are no step's
            self._step(longest)
        now.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None  # one graph runs at a time
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # a loader's thread may go on
            hidden = self._step(longest)
        return graph, hidden
