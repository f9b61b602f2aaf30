"""What a directory says about how its model speaks, what the user says instead, and what cannot be."""

import json
import shutil

import pytest
import torch

from lightning_llm.generation.config import DualChunkConfig, GenerationConfig, Sampling
from lightning_llm.generation.replies import reply_to
from lightning_llm.generation.speaker import UNUSED, load_speaker
from lightning_llm.settings import UserError
from lightning_llm.stages.config import ComputeConfig


@pytest.fixture
def directory(talker, tmp_path):
    """A copy to change."""
    return shutil.copytree(talker, tmp_path / "talker")


def load(directory, **settings):
    compute = {
        name: settings.pop(name) for name in ("precision", "accelerator", "attention", *UNUSED) if name in settings
    }
    return load_speaker(directory, GenerationConfig(**settings), ComputeConfig(**compute))


def say(directory, content, name="generation_config.json"):
    (directory / name).write_text(json.dumps(content))


def test_sampling_is_the_users_then_the_models_then_greedy(directory):
    assert load(directory).sampling == Sampling(temperature=0.0)
    assert load(directory, temperature=0.7, min_p=0.1).sampling == Sampling(0.7, min_p=0.1)
    say(directory, {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.8})
    assert load(directory).sampling == Sampling(0.6, 20, 0.8)
    assert load(directory, top_k=0, temperature=0.0).sampling == Sampling(0.0, 0, 0.8)
    say(directory, {"do_sample": False, "temperature": 0.6, "top_k": 20})  # what transformers ignores, too
    assert load(directory).sampling == Sampling(0.0)
    say(directory, {"do_sample": True})
    assert load(directory).sampling == Sampling(1.0)
    say(directory, {"repetition_penalty": 1.05})
    assert load(directory).sampling == Sampling(0.0, repetition_penalty=1.05)
    say(directory, {"do_sample": True, "top_p": 7})
    with pytest.raises(UserError, match=r"generation_config.json: top_p must lie in \(0, 1\]"):
        load(directory)


def test_stop_tokens_are_a_list_a_number_or_the_tokenizers(directory):
    tokenizer = load(directory).tokenizer
    assert load(directory).stop_ids == {tokenizer.eos_id, tokenizer.end_of_turn_id}
    say(directory, {"eos_token_id": [5, 9]})
    assert load(directory).stop_ids == {5, 9}
    assert load(directory).turn_stop_ids == {5, 9, tokenizer.end_of_turn_id}
    (directory / "generation_config.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    say(directory, config | {"eos_token_id": 11}, "config.json")
    assert load(directory).stop_ids == {11}
    say(directory, config | {"eos_token_id": None}, "config.json")
    assert load(directory).stop_ids == tokenizer.stop_ids


@pytest.mark.parametrize("ids", ["x", [[1]], [1, "2"], True])
def test_stop_tokens_that_are_no_numbers_are_refused(directory, ids):
    say(directory, {"eos_token_id": ids})
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id: is .*Give a number"):
        load(directory)


def test_what_is_left_out_is_said(directory, capsys):
    say(directory, {"num_beams": 1})
    load(directory)
    assert (
        capsys.readouterr().err
        == "note: attention by sdpa (the fastest on a CPU, and trains), new tokens by torch's products\n"
    )
    say(directory, {"num_beams": 4})
    load(directory)
    assert "num_beams 4" in capsys.readouterr().err


def test_what_attention_is_computed_with_is_said_or_refused(directory, capsys):
    assert load(directory, attention="sdpa").model.attention_backend == "sdpa"
    load(directory, dual_chunk=DualChunkConfig(2048))
    plain, dual = capsys.readouterr().err.splitlines()
    assert plain == "note: attention by sdpa (as asked), new tokens by torch's products"
    assert dual == "note: attention by dual chunks of 2,048 positions (dual_chunk.chunk_size)"
    with pytest.raises(UserError, match=r"compute\.attention: flash needs an NVIDIA GPU"):
        load(directory, attention="flash")


def test_a_prompt_has_to_fit(directory):
    speaker = load(directory)
    speaker.check("prompt", [1] * 255)
    with pytest.raises(UserError, match="has 256 tokens, and the model's context is 256"):
        speaker.check("prompt", [1] * 256)
    with pytest.raises(UserError, match="token 300 is none"):
        speaker.check("prompt", [300])
    yarn = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 256}
    assert load(directory, rope_scaling=yarn).context == 1024
    assert load(directory, rope_scaling={"rope_type": "linear", "factor": 2}).context == 512
    assert load(directory, dual_chunk=DualChunkConfig(256)).context is None


def test_a_stretch_that_was_trained_does_not_count_again(directory):
    """The model's files, what the user says in their place -> the tokens that there are positions for."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    llama3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 16}  # fmt: skip
    linear, default = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "default"}
    config = json.loads((directory / "config.json").read_text())
    for own, longest, given, expected in (
        (linear, 256, None, 256),  # trained on 256 tokens, at a quarter of their distances
        (linear, 256, linear, 256),
        (linear, 256, linear | {"factor": 8.0}, 512),
        (linear, 256, default, 64),
        (linear, 256, yarn | {"factor": 16.0}, 1024),
        (yarn, 256, None, 256),
        (yarn, 64, None, 256),  # as the makers of Qwen 2 advise
        (yarn, 64, yarn | {"factor": 8.0}, 512),
        (llama3, 256, llama3, 256),  # trained beyond what the factor alone reaches, as Llama 3.1
        (default, 256, linear, 1024),
    ):
        changed = {"rope_parameters": own | {"rope_theta": 1e4}, "rope_scaling": None, "rope_theta": 1e4}
        say(directory, config | changed | {"max_position_embeddings": longest}, "config.json")
        assert load(directory, rope_scaling=given).context == expected, (own, longest, given)


def test_a_reply_ends_where_the_context_does(directory):
    speaker = load(directory, max_new_tokens=50)
    prompts = [[260] * 240, [260] * 3, [261] * 255]
    replies = reply_to(speaker, prompts, conversations=[False] * 3, batch_size=3)
    expected = reply_to(load(directory, max_new_tokens=16), prompts[:1], conversations=[False])
    assert [len(reply.ids) for reply in replies] == [16, 50, 1]
    assert replies[0] == expected[0]
    assert {reply.ended_by for reply in replies} == {"length"}


def test_positions_stretched_at_inference(directory):
    """The same as a directory that says so itself."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    prompt = [[260, 261, 262] * 100]
    stretched = reply_to(load(directory, rope_scaling=yarn, max_new_tokens=20), prompt, conversations=[False])
    config = json.loads((directory / "config.json").read_text())
    theta = config["rope_theta"]
    changed = {"rope_parameters": yarn | {"rope_theta": theta}, "rope_scaling": None, "max_position_embeddings": 1024}
    say(directory, config | changed, "config.json")
    assert reply_to(load(directory, max_new_tokens=20), prompt, conversations=[False]) == stretched


def test_half_precision_is_half_the_memory(directory):
    weights = [load(directory, precision=name).model.embed_tokens.weight for name in ("fp32", "bf16")]
    assert [weight.dtype for weight in weights] == [torch.float32, torch.bfloat16]
    speaker = load(directory, precision="bf16", max_new_tokens=30)
    assert len(reply_to(speaker, [[260], [261] * 9], conversations=[False] * 2, batch_size=2)[1].ids) > 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": "fp8"}, "compute.precision: is 'fp8'"),
        ({"compile": True}, "compute.compile: is True, and does nothing .* Leave it at False"),
        ({"activation_checkpointing": "full"}, "compute.activation_checkpointing: is full, and does nothing"),
        ({"devices": 2}, "compute.devices: is 2, and does nothing"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_scaling: .*spiral"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling: original_max_position_embeddings"),
        ({"rope_scaling": 4}, "rope_scaling: 4 is no mapping"),
    ],
)
def test_settings_that_cannot_be(settings, said, directory):
    with pytest.raises(UserError, match=said):
        load(directory, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(directory):
    with pytest.raises(UserError, match="no GPU"):
        load(directory, accelerator="gpu")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
def test_a_file_that_is_damaged_is_named(file, directory):
    (directory / file).write_text("{")
    with pytest.raises(UserError, match=file):
        load(directory)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("generation_config.json", '{"do_sample": true, "top_k": 5.5}', "top_k should be a whole number, is 5.5"),
        ("generation_config.json", '{"do_sample": true, "temperature": "hot"}', "temperature should be a number"),
        ("generation_config.json", '{"repetition_penalty": [1.2]}', "repetition_penalty should be a number"),
        ("generation_config.json", '{"do_sample": "no"}', "do_sample should be true or false, is 'no'"),
        ("generation_config.json", '{"do_sample": true, "top_p": true}', "top_p should be a number, is True"),
        ("tokenizer_config.json", "[]", "is not a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token: is 5 and not the text of a token"),
        ("tokenizer_config.json", '{"eos_token": {"id": 5}}', "eos_token: is .* and not the text of a token"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template: is 5 and not the text of a template"),
        ("tokenizer_config.json", '{"chat_template": [{"template": "x"}]}', "chat_template: has an entry without a"),
        ("chat_template.jinja", b"caf\xe9", "is not text in UTF-8"),
    ],
)
def test_what_a_file_should_not_hold_is_one_line_with_file_and_key(file, content, said, directory):
    if "chat_template" in str(content):
        (directory / "chat_template.jinja").unlink(missing_ok=True)
    (directory / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said) as caught:
        load(directory)
    assert str(directory / file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_number_of_the_users_own_takes_the_place_of_a_damaged_one_only_if_it_is_heard(directory):
    say(directory, {"temperature": "hot", "top_k": 5.5}, "generation_config.json")
    assert load(directory).sampling.temperature == 0  # it does not sample, so they mean nothing


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_file_that_is_missing_is_named(file, directory):
    (directory / file).unlink()
    with pytest.raises(UserError, match=file):
        load(directory)


def test_numbers_out_of_range_are_named():
    for settings in (
        {"max_new_tokens": 0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"temperature": -0.1},
    ):
        [name] = settings
        with pytest.raises(ValueError, match=name):
            GenerationConfig(**settings)
    with pytest.raises(ValueError, match="empty stop string"):
        GenerationConfig(stop=["a", ""])
