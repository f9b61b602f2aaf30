"""What tests of the stages start from: a tokenizer, prepared text, conversations and pairs, settings of training."""

import io
import json
import random

import pytest

from lightning_llm.data.config import DataConfig, SourceConfig, TokenizerConfig
from lightning_llm.models import ModelConfig
from lightning_llm.objectives.config import CausalLMConfig, DPOConfig
from lightning_llm.optimization.config import AdamWConfig, LearningRateConfig
from lightning_llm.stages import prepare
from lightning_llm.stages.config import ComputeConfig, PrepareSettings, TokenizerSettings, TrainSettings
from lightning_llm.stages.context import StageContext
from lightning_llm.training.console import Console

MODEL = ModelConfig(
    name="tiny",
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    max_position_embeddings=32,
)
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def counting(chance: random.Random, longest: int) -> str:
    """Words that count on from somewhere: easy to learn."""
    start, length = chance.randrange(10), chance.randint(2, longest)
    return " ".join(WORDS[(start + i) % 10] for i in range(length))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """prose.jsonl, lists.jsonl (text), talks.jsonl (messages), pairs.jsonl."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = random.Random(0)
    rows = {
        "prose": [{"text": counting(chance, 100)} for _ in range(300)],
        "lists": [{"text": counting(chance, 8).replace(" ", "\n")} for _ in range(300)],
        "talks": [],
        "pairs": [],
    }
    for index in range(200):
        start = chance.randrange(10)
        question, answer = f"{index}: after {WORDS[start]}?", WORDS[(start + 1) % 10]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows["talks"].append({"messages": messages})
        rows["pairs"].append({"prompt": question, "chosen": f"it is {answer}", "rejected": answer})
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in content))
    return folder


@pytest.fixture(scope="session")
def data_config(corpus):
    """`data_config(form)` -> the mixture of that form."""
    sources = {"text": {"prose": 0.7, "lists": 0.3}, "conversations": {"talks": 1.0}, "pairs": {"pairs": 1.0}}

    def make(form):
        named = {n: SourceConfig(path=str(corpus / f"{n}.jsonl"), weight=w) for n, w in sources[form].items()}
        return DataConfig(name=form, form=form, sources=named, max_epochs=20, validation=0.1)

    return make


@pytest.fixture(scope="session")
def context_of(tmp_path_factory):
    """`context_of(settings, inputs)` -> the context of a stage with a fresh output."""

    def make(settings, inputs=None, **named):
        output = tmp_path_factory.mktemp("output")
        console = Console(1, io.StringIO()).stage(1, "stage", "kind")
        compute = named.pop("compute", None) or ComputeConfig(micro_batch_tokens=256)
        return StageContext("stage", settings, inputs or {}, output, compute, console, **named)

    return make


@pytest.fixture(scope="session")
def tokenizer_artifact(corpus, context_of):
    config = TokenizerConfig(
        vocab_size=300, sources={name: SourceConfig(path=str(corpus / f"{name}.jsonl")) for name in ("prose", "talks")}
    )
    context = context_of(TokenizerSettings(config, "train", seed=0))
    prepare.run(context)
    return context.output


@pytest.fixture(scope="session")
def prepared(data_config, tokenizer_artifact, context_of):
    """`prepared[form]` -> artifact."""
    artifacts = {}
    for form in ("text", "conversations", "pairs"):
        settings = PrepareSettings(data_config(form), [32, 64], ["train", "validation"], seed=0)
        context = context_of(settings, {"tokenizer": tokenizer_artifact})
        prepare.run(context)
        artifacts[form] = context.output
    return artifacts


@pytest.fixture(scope="session")
def settings(data_config):
    """`settings(form)` -> those of a short stage."""

    def make(form="text", **named):
        defaults = {
            "model": MODEL,
            "objective": DPOConfig() if form == "pairs" else CausalLMConfig(),
            "optimizer": AdamWConfig(eps=1e-5),
            "data": data_config(form),
            "lr": LearningRateConfig(peak=1e-2, warmup_share=0.1),
            "tokens": 12_000,
            "context": [{"at": 0, "value": 32}, {"at": 6000, "value": 64}],
            "batch_tokens": [{"at": 0, "value": 300}, {"at": 3000, "value": 600}],
            "rope_theta": None,
            "precision": "fp32",
            "seed": 3,
        }
        return TrainSettings(**(defaults | named))

    return make
