"""A real run of the whole recipe, small enough for a test: four stages with all that is inserted for them."""

from __future__ import annotations

import pytest

TINY = [  # overrides of qwen2 at nano
    "scale.pretraining_tokens=40_000",
    "scale.minimum_steps=12",
    "stages.sft.examples=200",
    "stages.dpo.examples=100",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.intermediate_size=64",
    "scale.vocabulary=512",
    "tokenizer.sample_bytes=50_000",
    "+tokenizer.sources={web: {path: 'embedded:web'}}",
    "stages.long_context.evaluate_every=1e9",  # at its begin and end only
    "stages.sft.evaluate_every=1e9",
    "scale.corpora.web.max_rows=40",
    "scale.corpora.code.max_rows=40",
    "scale.corpora.docs.path=null",  # reading these takes seconds
    "scale.corpora.math.path=null",
    "scale.corpora.instructions.options.rows=300",
    "scale.corpora.preferences.options.rows=200",
    "evaluation.text_tokens=2000",
    "evaluation.long_documents=2",
    "evaluation.questions=12",
    "evaluation.preference_pairs=8",
    "evaluation.max_new_tokens=12",
    "compute.threads=1",
]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """The folder of a finished run."""
    from lightning_llm import compose, run

    place = tmp_path_factory.mktemp("run")
    return run(compose("qwen2", overrides=[*TINY, f"store.root={place}/artifacts", f"runs={place}/runs"])).folder


@pytest.fixture(scope="session")
def tiny():
    """Overrides of qwen2 at nano that make it a matter of seconds."""
    return TINY
