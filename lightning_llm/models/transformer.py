"""The backbone: a decoder-only transformer over a flat run of segments; every family is a choice of its config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from torch.utils.checkpoint import checkpoint

from lightning_llm.batch import SegmentBatch
from lightning_llm.models import families
from lightning_llm.models.attention import Segments, attention
from lightning_llm.models.config import ModelConfig
from lightning_llm.models.feed_forward import FeedForward
from lightning_llm.models.rope import inverse_frequencies, rotate, rotation

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q [T, H, D], k and v [T, K, D] -> [T, H, D]


class ScaledToUnit(torch.autograd.Function):
    """x / rms(x) * weight with its own backward: a third of the time of torch's composed rms_norm on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return unit * weight

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        # with u = x / rms(x):  dx = (w g - u mean(w g u)) / rms(x),  dw = sum over tokens of g u
        unit, inverse, weight = ctx.saved_tensors
        product = gradient * unit
        mean = (product @ weight).unsqueeze(-1).div_(unit.shape[-1])
        return (gradient * weight).addcmul_(unit, mean, value=-1).mul_(inverse), product.sum(0), None


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019, arXiv 1910.07467), in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        exact, weight = x.float(), self.weight.float()
        if x.is_cpu:
            return ScaledToUnit.apply(exact, weight, self.eps).to(x.dtype)
        return rms_norm(exact, weight.shape, weight, self.eps).to(x.dtype)


class FusedLinear(nn.Linear):
    """Several projections of the same input in one product, their outputs one after the other."""

    def __init__(self, inputs: int, parts: tuple[int, ...], *, bias: bool):
        super().__init__(inputs, sum(parts), bias=bias)
        self.parts = parts  # outputs of each: an optimizer of whole matrices takes them apart


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; queries, keys and values come from one product."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_size = config.head_size
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        parts = tuple(heads * self.head_size for heads in (self.heads, self.key_value_heads, self.key_value_heads))
        self.qkv_proj = FusedLinear(config.hidden_size, parts, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.heads * self.head_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_size))  # [T, H + 2K, D]
        qk, v = qkv.split((self.heads + self.key_value_heads, self.key_value_heads), dim=1)
        q, k = rotate(qk, cos, sin).split((self.heads, self.key_value_heads), dim=1)
        return self.o_proj(attend(q, k, v).flatten(1))


class Layer(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Tokens in, hidden states out. The vocabulary is met in losses/likelihood.py, through `head_weight`.

    `config` may be exchanged for one with another RoPE base between stages; angles are made anew in each pass.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        families.check_family(config)
        inverse_frequencies(config.rope_parameters, config.head_size)  # refuses kinds of RoPE that are not built
        self.config = config
        self.attention_backend = "auto"
        self.activation_checkpointing = False  # keep a layer's input alone, and run it again in the backward pass
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Random weights that depend on the seed alone: matrices normal(0, initializer_range), norms 1, biases 0."""
        generator = torch.Generator(self.embed_tokens.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    @property
    def head_weight(self) -> Tensor:
        """[V, d]: what hidden states are multiplied with to get logits."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, batch: SegmentBatch) -> Tensor:
        """Hidden states [T, d] after the final norm."""
        segments = Segments(batch.lengths, batch.prefixes)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, segments, backend=self.attention_backend)

        return self.run(batch.input_ids, batch.positions, attend)

    def run(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, d] of tokens at given positions, with `attend` in the place of attention (a cache's)."""
        cos, sin = rotation(
            positions, inverse_frequencies(self.config.rope_parameters, self.config.head_size, positions.device)
        )
        x = self.embed_tokens(input_ids)
        again = self.activation_checkpointing and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            inputs = x, cos, sin, functools.partial(attend, index)
            # nothing in a layer is random: there is no state of a generator to keep
            x = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False) if again else layer(*inputs)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., V] of hidden states [.., d]."""
        return linear(hidden, self.head_weight)

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
        """A model from a Hugging Face directory (config.json and safetensors, one file or sharded).

        Raises:
            UserError: a file is missing, damaged or does not fit its config.json; names file and key.
        """
        directory = Path(directory)
        config = families.read_config(directory)
        with torch.device("meta"):
            model = cls(config)
        model.to(dtype).to_empty(device="cpu")
        families.read_weights(directory, config, dict(model.named_parameters()))
        return model

    def save_pretrained(self, directory: str | Path, eos_token_ids: list[int] | None = None) -> None:
        """Write config.json, generation_config.json and model.safetensors as transformers, vLLM and lm-eval read them.

        Args:
            directory: made if it is not there.
            eos_token_ids: tokens that end a generation, [end of turn, end of text] for a chat model.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        families.write_config(directory, self.config, self.embed_tokens.weight.dtype, eos_token_ids)
        families.write_weights(directory, self.config, dict(self.named_parameters()))
