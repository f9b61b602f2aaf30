"""The shape of a model, one dataclass with fields spelt as in config.json; and what each layer asks of attention."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from lightning_llm.settings import Buildable, came_later, option

SLIDING, FULL = "sliding_attention", "full_attention"  # transformers' words, in `layer_types`
# rope_type -> the keys of rope_parameters beside rope_type and rope_theta: those it needs, those it may have
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    ),
}
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")  # SwiGLU; GeGLU as Gemma 2 has it
COUNTS = (  # fields that are at least 1 where they have a value
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
    "query_pre_attn_scalar",
)
SIZES = ("intermediate_size", "num_key_value_heads", "hidden_size", "num_hidden_layers")  # that pruning makes smaller
MIXTURE_FIELDS = (  # what makes a mixture of experts of a dense model
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
    "router_aux_loss_coef",
)
POSITIVE = ("rms_norm_eps", "initializer_range", "attn_logit_softcapping", "final_logit_softcapping")


@dataclass(frozen=True)
class LayerAttention:
    """What one layer asks of attention beside queries, keys and values; None: nothing of the kind, the usual scale."""

    window: int | None = None  # tokens a query sees, itself included
    softcap: float | None = None  # scores are held between -softcap and softcap
    scale: float | None = None  # factor of the scores; none: 1 / sqrt(head size)


@option("model", "transformer")
@dataclass
class ModelConfig:
    """A decoder-only transformer. A family is a choice of these values, never a class of its own."""

    name: str = "???"  # the option's name, for the plan and the report
    family: str = "qwen2"  # which Hugging Face class the artifact is written as (models/family.py)
    vocab_size: int = 151_936  # rows of the embedding; may exceed the tokenizer's entries
    hidden_size: int = 3584
    intermediate_size: int = 18_944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int | None = None  # none: hidden_size / num_attention_heads
    hidden_act: str = "silu"  # one of ACTIVATIONS
    attention_bias: bool = True  # bias on the query, key and value projections (Qwen 2)
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10_000.0})
    max_position_embeddings: int = 32_768
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    tokenizer: str = "train"  # "train": on the recipe's own text; else a directory or hub name with tokenizer.json
    # what some families have; the defaults are a model without it
    qk_norm: bool = came_later(False)  # a norm of each head's query and key, before they are turned (AFM, Qwen 3)
    post_norms: bool = came_later(False)  # norms also of what attention and feed-forward add (Gemma 2)
    norms_add_one: bool = came_later(False)  # norms multiply by 1 + weight; the weight starts at 0 (Gemma 2)
    scale_embeddings: bool = came_later(False)  # embeddings are multiplied by sqrt(hidden_size) (Gemma 2)
    sliding_window: int | None = came_later(None)  # tokens that a query sees in layers of sliding attention
    layer_types: list[str] = came_later([FULL])  # sliding_attention | full_attention, repeated over the layers
    attn_logit_softcapping: float | None = came_later(None)  # scores of attention are held within +- this (Gemma 2)
    final_logit_softcapping: float | None = came_later(None)  # and logits (Gemma 2)
    query_pre_attn_scalar: int | None = came_later(None)  # scores are divided by its root; none: by that of head_dim
    # mixture of experts (Qwen2-57B-A14B); num_experts 0 is a dense model
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = False  # divide the weights of a token's experts by their sum
    router_aux_loss_coef: float = came_later(0.001)  # weight of the load-balancing loss beside the objective's
    decoder_sparse_step: int = came_later(1)  # one layer in so many has experts: the last of them
    mlp_only_layers: list[int] = came_later([])  # layers, counted from 0, that are dense in any case
    # figures of the report that vary with the size; the recipe refers to them as ${model.published.<key>}
    published: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        """Raises ValueError, naming the field, for shapes that no transformer can have."""
        check_values(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}) unless head_dim is given"
            )
        if self.head_size % 2:
            raise ValueError(f"the head size ({self.head_size}) must be even: rotary embeddings turn pairs of values")
        if not self.layer_types or not {SLIDING, FULL}.issuperset(self.layer_types):
            raise ValueError(f"layer_types must be a list of {SLIDING} and {FULL}, got {self.layer_types}")
        if SLIDING in self.layer_types and self.sliding_window is None:
            raise ValueError(f"layer_types names {SLIDING}, so sliding_window must have a value")
        if self.sliding_window is not None and SLIDING not in self.layer_types:
            fact = f"sliding_window is {self.sliding_window}, and no layer uses it"
            raise ValueError(f"{fact}: name {SLIDING} in layer_types, or set it to null")
        check_rope(self.rope_parameters)
        if self.num_experts:
            self._check_experts()

    def _check_experts(self) -> None:
        for name in ("moe_intermediate_size", "shared_expert_intermediate_size", "decoder_sparse_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 in a mixture of experts, got {getattr(self, name)}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            chosen = f"{self.num_experts_per_tok} of {self.num_experts}"
            raise ValueError(f"num_experts_per_tok must lie in [1, num_experts], got {chosen}")
        if self.router_aux_loss_coef < 0:
            raise ValueError(f"router_aux_loss_coef must not be negative, got {self.router_aux_loss_coef}")

    @property
    def head_size(self) -> int:
        """D: `head_dim`, or what it is by default."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    def layer_attention(self, layer: int) -> LayerAttention:
        """What layer `layer`, counted from 0, asks of attention. All that computes attention asks here."""
        slides = self.layer_types[layer % len(self.layer_types)] == SLIDING
        return LayerAttention(
            window=self.sliding_window if slides else None,
            softcap=self.attn_logit_softcapping,
            scale=None if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar**-0.5,
        )

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward half of a layer, counted from 0, is a mixture of experts."""
        return (
            bool(self.num_experts) and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        )


def check_values(config: ModelConfig) -> None:
    """Raises ValueError, its first word the field, for values that are wrong whatever the others are."""
    for names, low in ((COUNTS, "at least 1"), (POSITIVE, "above 0")):
        for name in names:
            value = getattr(config, name)
            if value is not None and not (value >= 1 if names is COUNTS else value > 0):
                raise ValueError(f"{name} must be {low}, got {value}")
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act must be {' or '.join(ACTIVATIONS)}, got {config.hidden_act}")


def check_rope(parameters: dict[str, Any]) -> None:
    """Raises ValueError where a key of rope_parameters is missing, unknown, or of a wrong value."""
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ROPE_KEYS:
        raise ValueError(f"rope_parameters.rope_type {rope_type!r} is not built yet; built are {', '.join(ROPE_KEYS)}")
    needed, optional = ROPE_KEYS[rope_type]
    for name in ("rope_theta", *needed):
        if name not in parameters:
            raise ValueError(f"rope_parameters.{name} has no value, and rope_type {rope_type} needs one")
    for name, value in parameters.items():
        if name != "rope_type" and name not in ("rope_theta", *needed, *optional):
            raise ValueError(f"rope_parameters.{name} means nothing to rope_type {rope_type}")
        if name == "truncate":
            if not isinstance(value, bool):
                raise ValueError(f"rope_parameters.truncate must be true or false, got {value!r}")
        elif name != "rope_type" and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise ValueError(f"rope_parameters.{name} must be a positive number, got {value!r}")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in parameters and high in parameters and parameters[low] >= parameters[high]:
            raise ValueError(f"rope_parameters.{low} must be below {high}")


def check_scaling(scaling: Any) -> None:
    """Raises ValueError where `rope_scaling`, which has all of rope_parameters but the base, is none."""
    if not isinstance(scaling, dict):
        raise ValueError(f"{scaling!r} is no mapping")
    try:
        check_rope({"rope_theta": 1.0} | scaling)
    except ValueError as error:
        raise ValueError(str(error).replace("rope_parameters.", "")) from error


def shortest_cycle(types: list[str]) -> list[str]:
    """The shortest beginning that, repeated, is the whole list."""
    for length in range(1, len(types)):
        if all(entry == types[layer % length] for layer, entry in enumerate(types)):
            return types[:length]
    return types


def set_rope_theta(config: ModelConfig, theta: float) -> ModelConfig:
    """The same model with another RoPE base (Qwen 2's long-context stage: 1e4 -> 1e6); everything else as it is."""
    return replace(config, rope_parameters={**config.rope_parameters, "rope_theta": float(theta)})


def set_rope_scaling(config: ModelConfig, scaling: dict[str, Any]) -> ModelConfig:
    """The same model with its RoPE stretched otherwise: `scaling` takes the place of all but the base.

    Raises:
        ValueError: a key is missing or unknown.
    """
    return replace(config, rope_parameters={"rope_theta": config.rope_parameters["rope_theta"], **scaling})


# ---- pruning: by which measure parts of a model stay (models/importance.py) ----


@dataclass
class PruneConfig(Buildable):
    """What all measures have in common; `build(model, batches, scores)` gives the importance of each part."""

    ranks: ClassVar[tuple[str, ...]] = ()  # of SIZES: what it can make smaller
    needs_data: ClassVar[bool] = False  # batches that go through the model
    needs_masks: ClassVar[bool] = False  # scores that a stage with objective pruning_masks has learnt

    name: str = "???"


@option("prune", "masks")
@dataclass
class MasksConfig(PruneConfig):
    """Hidden units by the masks that were learnt for them (AFM, arXiv 2407.21075)."""

    implementation: ClassVar[str] = "lightning_llm.models.importance:measure_masks"
    ranks: ClassVar[tuple[str, ...]] = ("intermediate_size",)
    needs_masks: ClassVar[bool] = True
    name: str = "masks"


@option("prune", "activation")
@dataclass
class ActivationConfig(PruneConfig):
    """By what flows through them; layers by how much they change the stream."""

    implementation: ClassVar[str] = "lightning_llm.models.importance:measure_activation"
    ranks: ClassVar[tuple[str, ...]] = SIZES
    needs_data: ClassVar[bool] = True
    name: str = "activation"


@option("prune", "magnitude")
@dataclass
class MagnitudeConfig(PruneConfig):
    """By norms of weights."""

    implementation: ClassVar[str] = "lightning_llm.models.importance:measure_magnitude"
    ranks: ClassVar[tuple[str, ...]] = ("intermediate_size", "num_key_value_heads", "hidden_size")
    name: str = "magnitude"
