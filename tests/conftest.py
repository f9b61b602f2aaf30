"""A real run of the whole recipe, small enough for a test: six stages with all that is inserted for them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes (`make test`): a core and a thread each,
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for what the tests start

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background, as by `nohup make test &`: what the
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests start and interrupt would ignore it as well

settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")


def pytest_collection_modifyitems(items):
    """What is marked `gpu` needs one."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


TINY = [  # overrides of qwen2 at nano
    "scale.pretraining_tokens=40_000",
    "scale.minimum_steps=12",
    "stages.sft.examples=200",
    "stages.dpo.examples=100",
    "stages.reward_model.examples=300",
    "stages.online_dpo.examples=24",
    "stages.online_dpo.rollout.prompts=8",
    "stages.online_dpo.rollout.held_out=6",
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
    "scale.corpora.comparisons.options={rows: 400, held_out: 60}",
    "scale.corpora.prompts.options.questions=100",
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
def beside(run_folder):
    """`beside(folder)` -> overrides of the finished run, for a copy of its store there: reused, and left as it was."""

    def copied(folder: Path) -> list[str]:
        given = json.loads((run_folder / "run.json").read_text())["overrides"]
        words = [word for word in given if not word.startswith(("recipe=", "scale=", "store.", "runs="))]
        shutil.copytree((run_folder / "artifacts" / "sft").resolve().parent, folder / "artifacts")
        return [*words, f"store.root={folder}/artifacts", f"runs={folder}/runs"]

    return copied


@pytest.fixture(scope="session")
def tiny():
    """Overrides of qwen2 at nano that make it a matter of seconds."""
    return TINY


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    """A Hugging Face directory of random weights with a tokenizer of its own: what it says varies."""
    import torch

    from lightning_llm.data.tokenizer import train_tokenizer
    from lightning_llm.models import ModelConfig, Transformer

    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog, naïvely: 你好 🙂"] * 20, 300)
    config = ModelConfig(
        name="talker", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=256,
    )  # fmt: skip
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    directory = tmp_path_factory.mktemp("talker")
    model.save_pretrained(directory, eos_token_ids=[tokenizer.end_of_turn_id, tokenizer.eos_id])
    tokenizer.save(directory)
    return directory
