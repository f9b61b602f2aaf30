"""The backbone: a decoder-only transformer over a flat run of segments; every family is a choice of its config."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from torch.utils.checkpoint import checkpoint

from lightning_llm.batch import SegmentBatch
from lightning_llm.losses.likelihood import token_log_likelihood, top_log_probabilities
from lightning_llm.models import families
from lightning_llm.models.attention import Segments, attention
from lightning_llm.models.config import ModelConfig
from lightning_llm.models.experts import MixtureOfExperts, Routed
from lightning_llm.models.family import check_family
from lightning_llm.models.feed_forward import FeedForward
from lightning_llm.models.rope import attention_factor, inverse_frequencies, rotate, rotation
from lightning_llm.models.soft_cap import soft_capped
from lightning_llm.settings import UserError

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q [T, H, D], k and v [T, K, D] -> [T, H, D]


def scaled_to_unit(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, [.., n] of x [.., n] and weight [n], all float32."""
    return (x * inverse_rms(x, eps)).mul_(weight)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x) over the last axis, [.., 1] of [.., n]."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class ScaledToUnit(torch.autograd.Function):
    """`scaled_to_unit` with its own backward: a third of the time of torch's composed rms_norm on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[.., n] of x [.., n] and weight [n], all float32."""
        inverse = inverse_rms(x, eps)
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return unit * weight

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x [.., n] and of the weight [n]."""
        # with u = x / rms(x):  dx = (w g - u mean(w g u)) / rms(x),  dw = sum over tokens of g u
        unit, inverse, weight = ctx.saved_tensors
        product = gradient * unit
        mean = (product @ weight).unsqueeze(-1).div_(unit.shape[-1])
        grad_weight = product.flatten(0, -2).sum(0)
        return (gradient * weight).addcmul_(unit, mean, value=-1).mul_(inverse), grad_weight, None


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467), in float32.

    The offset is 0, or 1 for Gemma 2: decay would then draw the norm to 1, not to 0.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """[.., n] of x [.., n], in its type."""
        exact, weight = x.float(), self.weight.float()
        if self.offset:
            weight = weight + self.offset
        if x.is_cpu:
            scaled = ScaledToUnit.apply if torch.is_grad_enabled() else scaled_to_unit
            return scaled(exact, weight, self.eps).to(x.dtype)
        return rms_norm(exact, weight.shape, weight, self.eps).to(x.dtype)


class FusedLinear(nn.Linear):
    """Several projections of the same input in one product, their outputs one after the other."""

    def __init__(self, inputs: int, parts: tuple[int, ...], *, bias: bool):
        super().__init__(inputs, sum(parts), bias=bias)
        self.parts = parts  # outputs of each: an optimizer of whole matrices takes them apart


def build_norm(config: ModelConfig, size: int) -> RMSNorm:
    """A norm over `size` values as the family has it."""
    return RMSNorm(size, config.rms_norm_eps, offset=float(config.norms_add_one))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; queries, keys and values come from one product."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_size = config.head_size
        self.heads, self.key_value_heads = config.num_attention_heads, config.num_key_value_heads
        parts = tuple(heads * self.head_size for heads in (self.heads, self.key_value_heads, self.key_value_heads))
        self.qkv_proj = FusedLinear(config.hidden_size, parts, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.heads * self.head_size, config.hidden_size, bias=False)
        self.q_norm = build_norm(config, self.head_size) if config.qk_norm else None
        self.k_norm = build_norm(config, self.head_size) if config.qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """[T, d] of hidden states [T, d].

        Args:
            cos, sin: float32 [T, 1, D], of `rope.rotation`.
            attend: q [T, H, D], k and v [T, K, D], turned -> [T, H, D].
        """
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_size))  # [T, H + 2K, D]
        qk, v = qkv.split((self.heads + self.key_value_heads, self.key_value_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((self.heads, self.key_value_heads), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = rotate(qk, cos, sin).split((self.heads, self.key_value_heads), dim=1)
        return self.o_proj(attend(q, k, v).flatten(1))


class Layer(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x); with `post_norms` what is added is normed as well.

    Norms are called as in the files, so `post_attention_layernorm` is the feed-forward's own norm, or with
    `post_norms` that of what attention returns.
    """

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.input_layernorm = build_norm(config, config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = build_norm(config, config.hidden_size)
        self.pre_feedforward_layernorm = build_norm(config, config.hidden_size) if config.post_norms else None
        self.mlp = MixtureOfExperts(config) if config.has_experts(index) else FeedForward(config)
        self.post_feedforward_layernorm = build_norm(config, config.hidden_size) if config.post_norms else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        kept: Tensor | None = None,
    ) -> Tensor:
        """[T, d] of hidden states [T, d]; the other arguments are those of attention.

        Args:
            kept: the tokens, of which alone `attend` returns something, and this as well; None: all.
        """
        attended = self.self_attn(self.input_layernorm(x), cos, sin, attend)
        x = x if kept is None else x[kept]
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


def run_again_backwards(layer: nn.Module, *inputs: Any) -> Tensor:
    """The layer's output, of which nothing is kept for the backward pass but its inputs."""
    # nothing in a layer is random: there is no state of a generator to keep
    contexts = functools.partial(_first_and_second_pass, layer)
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _first_and_second_pass(layer: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _noting_nothing(layer)


@contextmanager
def _noting_nothing(layer: nn.Module) -> Iterator[None]:
    """What a router did is said by the first pass alone; from the second one its graph would stay in memory."""
    if not isinstance(layer.mlp, MixtureOfExperts):
        yield
        return
    routed = layer.mlp.routed
    try:
        yield
    finally:  # the second pass ends by an exception as soon as it has made what is needed
        layer.mlp.routed = routed


class Transformer(nn.Module):
    """Tokens in, hidden states out. The vocabulary is met in losses/likelihood.py, through `log_likelihood`.

    `config` may be exchanged for one with another RoPE between stages; angles are made anew in each pass.
    """

    head: ClassVar[str] = families.LANGUAGE_MODEL

    def __init__(self, config: ModelConfig):
        super().__init__()
        check_family(config)
        self.config = config
        self.attention_backend = "auto"
        self.activation_checkpointing = False  # keep a layer's input alone, and run it again in the backward pass
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = build_norm(config, config.hidden_size)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Random weights that depend on the seed alone: matrices normal(0, initializer_range), biases 0, norms one."""
        generator = torch.Generator(self.embed_tokens.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") or self.config.norms_add_one else 1.0)

    @property
    def head_weight(self) -> Tensor:
        """[V, d]: what hidden states are multiplied with to get logits."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, batch: SegmentBatch) -> Tensor:
        """Hidden states [T, d] after the final norm; [i] is what comes of token i and of those that it attends to."""
        segments = Segments(batch.lengths, batch.prefixes)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            asks = self.config.layer_attention(layer)
            return attention(
                q,
                k,
                v,
                segments,
                window=asks.window,
                softcap=asks.softcap,
                scale=asks.scale,
                backend=self.attention_backend,
            )

        return self.run(batch.input_ids, batch.positions, attend)

    def run(self, input_ids: Tensor, positions: Tensor, attend: Attend, kept: Tensor | None = None) -> Tensor:
        """Hidden states [T, d] of tokens at given positions, with `attend` in the place of attention (a cache's).

        Args:
            input_ids, positions: int64 [T]; a position is counted from the begin of its text.
            attend: (layer, q [T, H, D], k [T, K, D], v [T, K, D]) -> [T, H, D], in order of the layers.
            kept: the tokens [n] whose hidden states are wanted, None: all. What the last layer makes of the others
                after their keys and values is left out; there `attend` returns [n, H, D].
        """
        rope = self.config.rope_parameters
        frequencies = inverse_frequencies(rope, self.config.head_size, positions.device)
        cos, sin = rotation(positions, frequencies, attention_factor(rope))
        x = self.embed_tokens(input_ids)
        if self.config.scale_embeddings:  # the factor in the type of the weights, as the family was trained
            x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)
        again = self.activation_checkpointing and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            inputs = x, cos, sin, functools.partial(attend, index)
            if kept is not None and index == len(self.layers) - 1:
                inputs = *inputs, kept
            x = run_again_backwards(layer, *inputs) if again else layer(*inputs)
        return self.norm(x)

    def take_routed(self) -> list[Routed]:
        """What each router did in the last pass, to be had once; nothing of a dense model."""
        routers = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MixtureOfExperts)]
        routed = [router.routed for router in routers if router.routed is not None]
        for router in routers:
            router.routed = None
        return routed

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., V] of hidden states [.., d], soft-capped where the family is."""
        return soft_capped(linear(hidden, self.head_weight), self.config.final_logit_softcapping)

    def log_likelihood(self, hidden: Tensor, target_ids: Tensor, **options: Any) -> Tensor:
        """`losses.likelihood.token_log_likelihood` under this model's head and soft-cap: [N] of hidden states [N, d].

        Args:
            options: its other arguments, as `token_weights`.
        """
        cap = self.config.final_logit_softcapping
        return token_log_likelihood(hidden, self.head_weight, target_ids, softcap=cap, **options)

    def top_log_probabilities(
        self, hidden: Tensor, labels: Tensor, k: int, temperature: float = 1.0, entries: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """`losses.likelihood.top_log_probabilities` under this model's head and soft-cap: [N, k] and [N, k + 2].

        Args:
            entries: ids that the tokenizer has; rows of the head beyond them are padding. None: all are ids.
        """
        cap = self.config.final_logit_softcapping
        head = self.head_weight[:entries]
        return top_log_probabilities(hidden, head, labels, k, softcap=cap, temperature=temperature)

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """A model from a Hugging Face directory (config.json and safetensors, one file or sharded).

        Raises:
            UserError: a file is missing, damaged or does not fit its config.json, or the model there has another head;
                names file and key.
        """
        model = cls._on_meta(Path(directory))
        model.to(dtype).to_empty(device="cpu")
        families.read_weights(Path(directory), model.config, model._stored())
        return model

    @classmethod
    def check_pretrained(cls, directory: str | Path) -> None:
        """Refuse what `from_pretrained` would, by config.json and the headers of the weights' files: cheap at any size.

        Raises:
            UserError: as `from_pretrained`.
        """
        model = cls._on_meta(Path(directory))
        families.read_weights(Path(directory), model.config, model._stored())

    @classmethod
    def _on_meta(cls, directory: Path) -> Self:
        config = families.read_config(directory)
        if (head := families.read_head(directory)) != cls.head:
            kinds = {families.LANGUAGE_MODEL: "a language model", families.CLASSIFIER: "a reward model"}
            what = f"holds {kinds[head]}, {kinds[cls.head]} is asked for"
            raise UserError(str(directory), what, "Name another directory")
        with torch.device("meta"):
            return cls(config)

    def _stored(self) -> dict[str, Tensor]:
        """The parameters that stand in the model's files."""
        return dict(self.named_parameters())

    def save_pretrained(self, directory: str | Path, eos_token_ids: list[int] | None = None) -> None:
        """Write config.json, generation_config.json and model.safetensors as transformers, vLLM and lm-eval read them.

        Args:
            directory: made if it is not there.
            eos_token_ids: tokens that end a generation, [end of turn, end of text] for a chat model.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        families.write_config(directory, self.config, self.embed_tokens.weight.dtype, eos_token_ids, self.head)
        families.write_weights(directory, self.config, self._stored())
