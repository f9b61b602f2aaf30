"""What each family of models spells in its config.json, always has, and has no room for. Without torch: a plan asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_llm.models.config import FULL, ModelConfig
from lightning_llm.settings import UserError

COPIED = {  # fields spelt alike in all config.json: what they are if it does not say (None: it has to)
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
PLAIN = {  # fields of which a family spells some in config.json, has others always, and lacks the rest
    "attention_bias": False,
    "qk_norm": False,
    "post_norms": False,
    "norms_add_one": False,
    "scale_embeddings": False,
    "sliding_window": None,
    "layer_types": [FULL],
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "num_experts": 0,
}


@dataclass(frozen=True)
class Family:
    """A class of transformers' that our files open as."""

    model_type: str
    architecture: str
    implies: dict[str, Any] = field(default_factory=dict)  # fields of ModelConfig that it always has, unlike PLAIN
    constants: dict[str, Any] = field(default_factory=dict)  # keys of config.json that have one value with us
    defaults: dict[str, Any] = field(default_factory=dict)  # of fields that it spells, where not those of COPIED
    renamed: dict[str, str] = field(default_factory=dict)  # field -> key of config.json
    windows: str = "none"  # none | switched (by use_sliding_window) | alternating (unless layer_types says otherwise)
    heads_share_width: bool = False  # transformers wants hidden_size to be a multiple of num_attention_heads

    @property
    def spelt(self) -> dict[str, Any]:
        """Fields that stand in its config.json as they are: what they are if it does not say."""
        return COPIED | self.defaults

    @property
    def implied(self) -> dict[str, Any]:
        """Fields that its config.json does not spell, since the class leaves no choice."""
        chosen = self.spelt.keys() | ({"sliding_window", "layer_types"} if self.windows != "none" else set())
        return {name: value for name, value in (PLAIN | self.implies).items() if name not in chosen}


FAMILIES = {
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", implies={"attention_bias": True}, windows="switched"),
    "qwen3": Family(  # AFM, too, is written as it
        "qwen3",
        "Qwen3ForCausalLM",
        implies={"qk_norm": True},
        constants={"attention_bias": False},
        defaults={"head_dim": 128},
        windows="switched",
    ),
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        constants={"attention_bias": False, "mlp_bias": False},
        defaults={"max_position_embeddings": 2048},
        heads_share_width=True,
    ),
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        implies={"post_norms": True, "norms_add_one": True, "scale_embeddings": True},
        constants={"attention_bias": False, "use_bidirectional_attention": False},
        defaults={
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        renamed={"hidden_act": "hidden_activation"},
        windows="alternating",
        heads_share_width=True,
    ),
    "qwen2_moe": Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        implies={"attention_bias": True},
        constants={"qkv_bias": True, "use_sliding_window": False},
        defaults={
            "num_experts": None,
            "num_experts_per_tok": None,
            "moe_intermediate_size": None,
            "shared_expert_intermediate_size": None,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.001,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
}


def check_family(config: ModelConfig) -> None:
    """Raises UserError where no Hugging Face class has room for a model: none is trained that cannot be kept."""
    where = f"model {config.name}"
    if config.family not in FAMILIES:
        raise UserError(f"{where}: family", f"{config.family!r} is not built yet", f"Built are: {', '.join(FAMILIES)}")
    family = FAMILIES[config.family]
    for key, value in family.implied.items():
        if getattr(config, key) != value:
            fact = f"is {getattr(config, key)}, but {family.architecture} always has {value}"
            raise UserError(f"{where}: {key}", fact, f"Set it to {value}, or choose another family")
    if family.heads_share_width and config.hidden_size % config.num_attention_heads:
        fact = f"{config.hidden_size} is no multiple of num_attention_heads, as {family.architecture} wants it"
        raise UserError(f"{where}: hidden_size", fact, "Change one of them, or choose another family")
    if "num_experts" in family.spelt and not config.num_experts:
        raise UserError(f"{where}: num_experts", f"is 0 in family {config.family}", "Give it, or choose a dense family")
