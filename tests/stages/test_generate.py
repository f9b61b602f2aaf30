"""Sampling prompts from several models: the same samples, interrupted or not."""

from __future__ import annotations

import json
import math
import random
from collections import Counter

import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.config import DataConfig, SourceConfig
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.generation.config import SamplingConfig
from lightning_llm.generation.sampling import request_uniforms
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.objectives.base import token_logps
from lightning_llm.settings import UserError
from lightning_llm.stages import generate, prepare
from lightning_llm.stages.config import GenerateSettings, PrepareSettings
from lightning_llm.stages.samples import grow_rows, read_rows

WORDS = ["one", "two", "three"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer_artifact, context_of):
    """Prompts of two sources, and two models that know nothing yet."""
    folder = tmp_path_factory.mktemp("prompts")
    for name, count in (("easy", 40), ("hard", 10)):
        rows = [{"prompt": f"{name} {i}: {WORDS[i % 3]}?", "answer": str(i), "task": name} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = {name: SourceConfig(path=str(folder / f"{name}.jsonl")) for name in ("easy", "hard")}
    data = DataConfig(name="asked", form="questions", sources=sources, validation=0.0)
    context = context_of(PrepareSettings(data, [], ["train"], seed=0), {"tokenizer": tokenizer_artifact})
    prepare.run(context)
    found = {"data": context.output, "tokenizer": tokenizer_artifact}
    tokenizer = Tokenizer.load(tokenizer_artifact / "tokenizer")
    for number in range(2):
        model = Transformer(
            ModelConfig(
                name="tiny",
                vocab_size=tokenizer.vocab_size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=True,
                max_position_embeddings=64,
            )
        )
        model.reset_parameters(number)
        model.save_pretrained(folder / f"model{number}", eos_token_ids=[tokenizer.end_of_turn_id, tokenizer.eos_id])
        tokenizer.save(folder / f"model{number}")
        found[f"model.{number}"] = folder / f"model{number}"
    return found


def settings(**changes):
    common = dict(
        models=["sft", "dpo"], weights={"easy": 3.0, "hard": 1.0}, prompts=12, round=0, per_prompt=3, max_new_tokens=6,
        sampling=SamplingConfig(), precision="fp32", seed=0,
    )  # fmt: skip
    return GenerateSettings(**(common | changes))


@pytest.fixture(scope="module")
def sampled(inputs, context_of):
    context = context_of(settings(), inputs)
    return generate.run(context), context.output


def test_every_prompt_has_the_responses_of_all_models(sampled):
    result, folder = sampled
    rows = list(read_rows(folder / "samples.jsonl"))
    assert (len(rows), result.metrics["prompts"], result.metrics["samples"]) == (12, 12, 72)
    assert Counter(row["task"] for row in rows) == {"easy": 9, "hard": 3}  # by their weights
    for row in rows:
        assert [response["model"] for response in row["responses"]] == ["sft"] * 3 + ["dpo"] * 3
        assert row["prompt"][0]["content"].startswith(f"{row['task']} {row['answer']}:")
    assert len({row["prompt"][0]["content"] for row in rows}) == 12
    assert not (folder / "parts").exists()
    lengths = [len(response["ids"]) for row in rows for response in row["responses"]]
    assert result.metrics["responses/length"] == pytest.approx(sum(lengths) / 72)
    assert sum(result.ledger.values()) == sum(lengths) + 2 * sum(len(row["prompt_ids"]) for row in rows)


def test_log_probabilities_are_those_of_the_model(sampled, inputs):
    """Against the model's own forward pass over prompt and response."""
    for row in list(read_rows(sampled[1] / "samples.jsonl"))[:3]:
        for number, name in enumerate(("sft", "dpo")):
            model = Transformer.from_pretrained(inputs[f"model.{number}"]).eval()
            own = [response for response in row["responses"] if response["model"] == name]
            batch = SegmentBatch.from_groups([row["prompt_ids"]], [[response["ids"] for response in own]])
            with torch.no_grad():
                expected = token_logps(model, batch)[batch.target_mask]
            drawn = torch.tensor([logp for response in own for logp in response["logps"]])
            torch.testing.assert_close(drawn, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("cut", ["half a line", "within a chunk", "after a chunk", "before the last file"])
def test_what_was_interrupted_is_continued_and_nobody_can_tell(cut, sampled, inputs, context_of, monkeypatch):
    monkeypatch.setattr(generate, "TOGETHER", 12)  # four prompts at a time
    whole = context_of(settings(), inputs)
    generate.run(whole)
    expected = (whole.output / "samples.jsonl").read_bytes()

    class Killed(BaseException):
        pass

    context = context_of(settings(), inputs)
    asked = []

    def stop(member, first, end, sample=generate.Member.sample):
        asked.append((member.number, first))
        if len(asked) > 4:  # of the second model's three chunks one is written
            raise Killed
        return sample(member, first, end)

    with monkeypatch.context() as patch:
        patch.setattr(generate.Member, "sample", stop)
        with pytest.raises(Killed):
            generate.run(context)
    second = context.output / "parts" / "1.jsonl"
    written = second.read_bytes()
    assert written.count(b"\n") == 4
    second.write_bytes(
        {"half a line": written[:-20], "within a chunk": written[: written.index(b"\n") + 1], "after a chunk": written,
         "before the last file": b""}[cut]
    )  # fmt: skip
    asked.clear()

    def note(member, first, end, sample=generate.Member.sample):
        asked.append((member.number, first))
        return sample(member, first, end)

    with monkeypatch.context() as patch:
        patch.setattr(generate.Member, "sample", note)
        generate.run(context)
    assert asked == ([(1, 4), (1, 8)] if cut == "after a chunk" else [(1, 0), (1, 4), (1, 8)])  # the first is not asked
    assert (context.output / "samples.jsonl").read_bytes() == expected


def test_a_sample_depends_on_its_prompts_place_and_not_on_how_many_there_are(sampled, inputs, context_of, monkeypatch):
    monkeypatch.setattr(generate, "TOGETHER", 12)
    rows = {}
    for count in (8, 4):
        context = context_of(settings(prompts=count, weights={"easy": 1.0, "hard": 0.0}), inputs)
        generate.run(context)
        rows[count] = list(read_rows(context.output / "samples.jsonl"))
    for more, fewer in zip(rows[8], rows[4], strict=False):
        assert more["prompt"] == fewer["prompt"]
        assert [r["ids"] for r in more["responses"]] == [r["ids"] for r in fewer["responses"]]


def test_stop_strings_are_left_out_of_texts(sampled, inputs, context_of):
    before = [response for row in read_rows(sampled[1] / "samples.jsonl") for response in row["responses"]]
    stop = next(r["text"] for r in before if len(r["text"]) > 3)[2:4]
    context = context_of(settings(stop=[stop]), inputs)
    generate.run(context)
    after = [response for row in read_rows(context.output / "samples.jsonl") for response in row["responses"]]
    for whole, cut in zip(before, after, strict=True):
        assert cut["text"] == whole["text"].partition(stop)[0]
        assert cut["ids"] == whole["ids"][: len(cut["ids"])]
        assert cut["is_complete"] == (whole["is_complete"] or stop in whole["text"])
    assert any(len(cut["ids"]) < len(whole["ids"]) for whole, cut in zip(before, after, strict=True))


def test_seeds_models_and_rounds_draw_otherwise(sampled, inputs, context_of):
    first = list(read_rows(sampled[1] / "samples.jsonl"))
    twins = dict(inputs, **{"model.1": inputs["model.0"]})
    context = context_of(settings(), twins)
    generate.run(context)
    for row in read_rows(context.output / "samples.jsonl"):
        own, other = ([r["ids"] for r in row["responses"] if r["model"] == name] for name in ("sft", "dpo"))
        assert own != other
    context = context_of(settings(seed=1), inputs)
    generate.run(context)
    again = {row["prompt"][0]["content"]: row["responses"] for row in read_rows(context.output / "samples.jsonl")}
    for row in first:
        if responses := again.get(row["prompt"][0]["content"]):
            assert [r["ids"] for r in responses] != [r["ids"] for r in row["responses"]]


def test_no_two_chunks_share_random_numbers():
    """Of three models, six rounds and 60 chunks each: the first number of each response is nobody else's."""
    chunks = [(model, turn, first) for model in range(3) for turn in range(6) for first in range(0, 3840, 64)]
    seeds = [generate.seed_of(0, *chunk) for chunk in chunks]
    drawn = {request_uniforms(number, 1, seed).item() for seed in seeds for number in range(8)}
    assert len(drawn) == 8 * len(chunks)
    assert max(seeds) >= 2**63  # all 64 bits are used


def test_a_file_grows_by_whole_chunks(tmp_path):
    """Against a plain list, for every place at which the file may have been cut."""
    rows = [{"row": number, "text": "é" * (number % 3)} for number in range(7)]
    path = tmp_path / "rows.jsonl"
    list(grow_rows(path, 7, 3, lambda first, end: rows[first:end]))
    whole = path.read_bytes()
    for cut in random.Random(0).sample(range(len(whole) + 1), 25):
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        steps = list(grow_rows(path, 7, 3, lambda first, end: rows[first:end]))
        assert steps[0] == (7 if lines == 7 else lines // 3 * 3)
        assert path.read_bytes() == whole
    assert math.isclose(len(list(read_rows(path))), 7)


def test_a_committee_shares_one_tokenizer(inputs, context_of, talker):
    with pytest.raises(UserError, match="tokenizer"):
        generate.run(context_of(settings(), inputs | {"model.1": talker}))


def test_prompts_that_fill_the_context_are_left_out(inputs, context_of):
    config = json.loads((inputs["model.0"] / "config.json").read_text())
    context = context_of(settings(), inputs)
    longest = max(
        len(asked.question.prompt_ids)
        for asked in generate.choose_prompts(context, settings(), config["max_position_embeddings"])
    )
    fewer = generate.choose_prompts(context, settings(), longest)
    assert 0 < len(fewer) < 12
    with pytest.raises(UserError, match="no prompt that can be asked"):
        generate.choose_prompts(context, settings(), 1)
