"""What all comparisons run: a Llama of 6.5 million parameters from fixed random weights, and random batches for it."""

from __future__ import annotations

import random
from pathlib import Path

from lightning_llm.data.tokenizer import train_tokenizer
from lightning_llm.models import ModelConfig, Transformer

CONFIG = ModelConfig(
    name="llama_6_5m",
    family="llama",
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    attention_bias=False,
    tie_word_embeddings=True,
    max_position_embeddings=2048,
)


def write_model(folder: Path, seed: int) -> str:
    """A Hugging Face directory with weights of `seed`; the tokenizer is there because TRL wants one, ids are random."""
    model = Transformer(CONFIG)
    model.reset_parameters(seed)
    model.save_pretrained(folder)
    train_tokenizer(["a few words are enough"], 300).save(folder)
    return str(folder)


def products(tokens: int) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of every matrix product with weights in a forward pass over so many tokens."""
    width, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    queries = CONFIG.num_attention_heads * CONFIG.head_size
    qkv = queries + 2 * CONFIG.num_key_value_heads * CONFIG.head_size
    layer = [(width, qkv), (queries, width), (width, inner), (width, inner), (inner, width)]
    return [(tokens, *shape) for shape in layer * CONFIG.num_hidden_layers + [(width, CONFIG.vocab_size)]]


def tokens(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(3, CONFIG.vocab_size) for _ in range(count)]


def full_rows(calls: int) -> list[list[list[int]]]:
    """4 documents of 512 tokens a call."""
    chance = random.Random(0)
    return [[tokens(chance, 512) for _ in range(4)] for _ in range(calls)]


def mixed_documents(calls: int) -> list[list[list[int]]]:
    """8 documents of 32 to 512 tokens a call, every length alike."""
    chance = random.Random(1)
    return [[tokens(chance, chance.randint(32, 512)) for _ in range(8)] for _ in range(calls)]


def conversations(calls: int) -> list[list[tuple[list[int], list[int]]]]:
    """8 prompts of 16 to 256 tokens with an answer of 16 to 256 a call."""
    chance = random.Random(2)
    return [
        [(tokens(chance, chance.randint(16, 256)), tokens(chance, chance.randint(16, 256))) for _ in range(8)]
        for _ in range(calls)
    ]


def pairs(calls: int) -> list[list[tuple[list[int], list[int], list[int]]]]:
    """8 prompts of 64 to 256 tokens with two responses of 16 to 128 each a call."""
    chance = random.Random(3)
    return [
        [
            (
                tokens(chance, chance.randint(64, 256)),
                tokens(chance, chance.randint(16, 128)),
                tokens(chance, chance.randint(16, 128)),
            )
            for _ in range(8)
        ]
        for _ in range(calls)
    ]
