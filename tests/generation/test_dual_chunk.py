"""Dual chunk attention against its formula, distance by distance in float64, and in a whole model."""

import math

import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.generation import dual_chunk
from lightning_llm.generation.config import DualChunkConfig
from lightning_llm.generation.dual_chunk import DualChunk
from lightning_llm.generation.engine import generate
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.rope import inverse_frequencies, rotate, rotation

ROPE = {"rope_type": "default", "rope_theta": 100.0}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}


def distances(length: int, c: int, s: int) -> list[list[int]]:
    """M[i][j] for j <= i: what the paper's figure 2 shows, from its three sets of positions."""
    matrix = []
    for i in range(length):
        row = []
        for j in range(i + 1):
            age = i // s - j // s
            query = i % s if age == 0 else min(s + i % s, c - 1) if age == 1 else c - 1
            row.append(query - j % s)
        matrix.append(row)
    return matrix


def test_distances_of_the_papers_example():
    """c = 10, s = 6, 12 tokens (section 3): successive positions 6 7 8 9 9 9."""
    matrix = distances(12, c=10, s=6)
    assert matrix[5] == [5, 4, 3, 2, 1, 0]
    assert matrix[6] == [6, 5, 4, 3, 2, 1, 0]
    assert matrix[9] == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert matrix[11] == [9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0]
    assert max(map(max, distances(50, c=10, s=6))) == 9


def plain(q, k, v, c, s, rope, softcap, scale):
    """One text in float64, a pair of query and key at a time: q [L, H, D], k and v [L, K, D], not turned yet."""
    frequencies = inverse_frequencies(rope, q.shape[-1]).double()
    length, heads, half = q.shape[0], q.shape[1], q.shape[-1] // 2
    matrix = distances(length, c, s)
    output = torch.zeros_like(q)
    for head in range(heads):
        of = head * k.shape[1] // heads
        for i in range(length):
            scores = []
            for j, distance in enumerate(matrix[i]):
                turn = torch.polar(torch.ones(half, dtype=torch.float64), distance * frequencies)
                query = torch.complex(q[i, head, :half], q[i, head, half:])
                key = torch.complex(k[j, of, :half], k[j, of, half:])
                score = (query * turn * key.conj()).real.sum() * scale
                scores.append(score if softcap is None else softcap * (score / softcap).tanh())
            output[i, head] = torch.stack(scores).softmax(0) @ v[: i + 1, of]
    return output


def turned(x, positions, rope):
    return rotate(x, *rotation(positions, inverse_frequencies(rope, x.shape[-1])))


@pytest.mark.parametrize("block", [2**24, 1], ids=["whole chunks", "blocks of 16"])
@pytest.mark.parametrize(("c", "w"), [(10, 4), (8, 6), (40, 10), (25, 1)])
@pytest.mark.parametrize(("softcap", "scale", "rope"), [(None, None, ROPE), (2.0, 0.4, ROPE)], ids=["plain", "capped"])
def test_prompts_and_steps_are_the_formula(block, c, w, softcap, scale, rope, monkeypatch):
    monkeypatch.setattr(dual_chunk, "SCORES", block)
    config = DualChunkConfig(c, w)
    lengths, s = [37, 3, 22], c - w
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    expected = [
        plain(*parts, c, s, rope, softcap, 8**-0.5 if scale is None else scale)
        for parts in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    positions = torch.cat([torch.arange(length) for length in lengths])
    q, k, v = (x.float() for x in (turned(q, positions % s, rope), turned(k, positions % s, rope), v))
    attend = DualChunk(config, inverse_frequencies(rope, 8))
    got = attend.attend(q, k, v, lengths, scale, softcap)
    torch.testing.assert_close(got.double(), torch.cat(expected), rtol=0, atol=2e-6)

    # the last token of each as a step of its own: texts end in the same column, what lies before them is hidden
    longest = max(lengths)
    keys, values = torch.randn(2, 3, 2, longest, 8, generator=generator)
    of_keys = torch.stack([torch.arange(longest) - (longest - length) for length in lengths])
    for row, (own_k, own_v) in enumerate(zip(k.split(lengths), v.split(lengths), strict=True)):
        keys[row, :, longest - lengths[row] :] = own_k.transpose(0, 1)
        values[row, :, longest - lengths[row] :] = own_v.transpose(0, 1)
    mask = torch.zeros(3, longest).masked_fill(of_keys < 0, -math.inf)[:, None, None]
    last = torch.tensor(lengths).cumsum(0) - 1
    stepped = attend.attend_step(q[last], keys, values, torch.tensor(lengths) - 1, of_keys, mask, scale, softcap)
    torch.testing.assert_close(stepped, got[last], rtol=0, atol=2e-6)


# ---- in a model ----


def build_model(rope):
    model = Transformer(
        ModelConfig(
            name="tiny", vocab_size=43, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=2, rope_parameters=rope, max_position_embeddings=32,
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module", params=[ROPE, YARN], ids=["plain", "yarn"])
def model(request):
    return build_model(request.param)


PROMPTS = [[5, 6, 7], list(range(1, 41)), [3] * 20, list(range(30, 2, -1))]


@torch.no_grad()
def recomputed(model, prompt, count, config):
    """Greedy, the whole text anew for each token, through the attention of prompts alone."""
    attend = DualChunk(config, inverse_frequencies(model.config.rope_parameters, model.config.head_size))
    ids = list(prompt)
    for _ in range(count):
        batch = SegmentBatch.from_documents([ids])
        hidden = model.run(
            batch.input_ids,
            batch.positions % config.period,
            lambda layer, q, k, v, lengths=batch.lengths: attend.attend(q, k, v, lengths, None, None),
        )
        ids.append(model.logits(hidden[-1]).argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_over_many_chunks(model, batch_size):
    config = DualChunkConfig(12, 4)
    expected = [recomputed(model, prompt, 30, config) for prompt in PROMPTS]
    options = {"max_new_tokens": 30, "stop_ids": (), "batch_size": batch_size}
    assert generate(model, PROMPTS, dual_chunk=config, **options) == expected
    assert generate(model, PROMPTS, **options) != expected


def test_within_one_chunk_it_is_ordinary_attention(model):
    options = {"max_new_tokens": 20, "stop_ids": ()}
    ordinary = generate(model, PROMPTS, **options)
    assert generate(model, PROMPTS, dual_chunk=DualChunkConfig(80), **options) == ordinary  # s = 60 = 40 + 20
    assert generate(model, PROMPTS, dual_chunk=DualChunkConfig(), **options) == ordinary


def test_settings_that_make_no_sense():
    assert (DualChunkConfig(100).period, DualChunkConfig(100, 10).period) == (75, 90)
    for values in ((10, 10), (10, 0), (10, -1), (None, 5)):
        with pytest.raises(ValueError, match="local_size"):
            DualChunkConfig(*values)
