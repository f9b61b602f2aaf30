"""Greedy generation, batched and cached, is transformers' own, token by token, for every family."""

import pytest
import torch

from lightning_llm.generation.config import Sampling
from lightning_llm.generation.engine import generate
from lightning_llm.generation.speaker import read_stop_ids
from lightning_llm.models import Transformer

COMMON = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "pad_token_id": 0,
    "eos_token_id": [7, 19],
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES = {
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen2, yarn": {"rope_parameters": YARN},
    "Qwen2Moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20,
    },
    "Qwen3": {"head_dim": 6, "tie_word_embeddings": True},
    "Gemma2": {
        "head_dim": 6, "sliding_window": 8, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "Llama": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}},
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def theirs(request, tmp_path_factory):
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    name = request.param.partition(",")[0]
    config = getattr(transformers, f"{name}Config")(**COMMON | FAMILIES[request.param])
    config._attn_implementation = "eager"  # the only one of theirs that soft-caps
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_scale = "norm" in key and name != "Gemma2"
            is_embedding = (
                "embed" in key and name == "Gemma2"
            )  # which multiplies them, so that tokens repeat themselves
            parameter.normal_(1.0 if is_scale else 0.0, 0.05 if is_embedding else 0.3, generator=generator)
    model.directory = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(model.directory)
    return model


def test_greedy(theirs):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(8, 61, (n,), generator=generator).tolist() for n in (3, 1, 17, 4, 30, 9, 2, 12)]
    ours = Transformer.from_pretrained(theirs.directory)
    stop_ids = read_stop_ids(theirs.directory, {})
    assert stop_ids == {7, 19}
    responses = generate(ours, prompts, max_new_tokens=40, stop_ids=stop_ids, batch_size=5)
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert response == expected[0, len(prompt) :].tolist()
    assert len({token for response in responses for token in response}) > 30  # there was something to choose
    penalised = generate(
        ours, prompts, max_new_tokens=10, stop_ids=stop_ids, sampling=Sampling(repetition_penalty=1.3), batch_size=5
    )
    for prompt, response in zip(prompts, penalised, strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 10, "do_sample": False, "repetition_penalty": 1.3}
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert response == expected[0, len(prompt) :].tolist()
    lengths = [len(response) for response in responses]
    assert max(lengths) > 20  # several windows on
    assert min(lengths) < 20  # and some ended by a stop token
