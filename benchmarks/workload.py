"""What every library is given: the same Llama of 6.5 million weights, and the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.reward import RewardModel
from lightning_llm.models.size import training_flops

MODEL = ModelConfig(
    name="llama_6.5m",
    family="llama",
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    attention_bias=False,
    tie_word_embeddings=True,
    max_position_embeddings=1024,
)
LEARNING_RATE = 1e-4
Tokens = list[int]


def save_model(folder: Path, seed: int) -> str:
    """A Hugging Face directory of random weights, with a tokenizer in which word "n" is token n."""
    return _save(_random_model(seed), folder)


def save_reward_model(folder: Path, seed: int) -> str:
    """The same with a head for scores in place of the vocabulary's."""
    return _save(RewardModel.from_backbone(_random_model(seed), seed), folder)


def _random_model(seed: int) -> Transformer:
    model = Transformer(MODEL)
    model.reset_parameters(seed)
    return model


def _save(model: Transformer, folder: Path) -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model.save_pretrained(folder, eos_token_ids=[1])
    Tokenizer(WordLevel({str(n): n for n in range(MODEL.vocab_size)}, unk_token="2")).save(
        str(folder / "tokenizer.json")
    )
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "0", "eos_token": "1", "unk_token": "2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return str(folder)


def full_rows(calls: int, rows: int = 4, length: int = 512) -> list[list[Tokens]]:
    """For each call so many documents of one length."""
    return [[_tokens(rng, length) for _ in range(rows)] for rng in _generators(calls)]


def mixed_documents(calls: int, documents: int = 8) -> list[list[Tokens]]:
    """For each call documents of 32 to 512 tokens, all lengths alike likely."""
    return [[_tokens(rng, rng.integers(32, 513)) for _ in range(documents)] for rng in _generators(calls)]


def conversations(calls: int, rows: int = 8) -> list[list[tuple[Tokens, Tokens]]]:
    """For each call prompts of 16 to 256 tokens with answers of as many; the answers are learnt."""
    return [
        [(_tokens(rng, rng.integers(16, 257)), _tokens(rng, rng.integers(16, 257))) for _ in range(rows)]
        for rng in _generators(calls)
    ]


def pairs(calls: int, rows: int = 8) -> list[list[tuple[Tokens, Tokens, Tokens]]]:
    """For each call prompts of 64 to 256 tokens with two responses of 16 to 128."""
    return [
        [
            (_tokens(rng, rng.integers(64, 257)), *(_tokens(rng, rng.integers(16, 129)) for _ in range(2)))
            for _ in range(rows)
        ]
        for rng in _generators(calls)
    ]


def response_lengths(calls: int, rows: int) -> list[list[int]]:
    """For each call so many lengths of 8 to 128 tokens, all alike likely."""
    return [rng.integers(8, 129, rows).tolist() for rng in _generators(calls)]


def products() -> list[tuple[int, int, int]]:
    """The matrix products of a step on 2,048 tokens as (rows, inputs, outputs); the vocabulary's in chunks."""
    config, tokens, chunk = MODEL, 2048, 256
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_size
    qkv = heads + 2 * config.num_key_value_heads * config.head_size
    layer = [(tokens, width, qkv), (tokens, heads, width), (tokens, width, 2 * inner), (tokens, inner, width)]
    return layer + [(chunk, width, config.vocab_size)] * 2  # 8 chunks to 6 layers, about


def step_flops(documents: list[Tokens]) -> float:
    return training_flops(MODEL, [(len(tokens), 0) for tokens in documents])


def _generators(calls: int) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in range(calls)]


def _tokens(rng: np.random.Generator, length: Any) -> Tokens:
    return rng.integers(3, MODEL.vocab_size, int(length)).tolist()
