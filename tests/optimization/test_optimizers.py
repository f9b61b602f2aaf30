"""Which parameters decay."""

from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.optimization.config import AdamWConfig


def test_matrices_decay_and_vectors_do_not():
    model = Transformer(
        ModelConfig(
            vocab_size=10,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )
    model.norm.requires_grad_(False)
    optimizer = AdamWConfig(weight_decay=0.3, betas=(0.8, 0.9)).build(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, value in decay.items():
        assert value == (0.0 if "norm" in name or name.endswith("bias") else 0.3), name
    assert decay["embed_tokens.weight"] == 0.3
    assert "norm.weight" not in decay
    assert len(decay) == len(names) - 1
    assert optimizer.defaults["fused"]
    assert optimizer.defaults["betas"] == (0.8, 0.9)
