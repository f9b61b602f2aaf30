"""The ring of a windowed layer: as much memory as the window, and what a cache of everything gives."""

import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.generation.cache import Cache, cache_bytes, decode, prefill
from lightning_llm.generation.engine import generate
from lightning_llm.models import ModelConfig, Transformer

WINDOW = 8


@pytest.fixture(scope="module", params=[None, 3.0], ids=["uncapped", "capped"])
def model(request):
    model = Transformer(
        ModelConfig(
            name="tiny", family="gemma2", vocab_size=43, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
            num_attention_heads=6, num_key_value_heads=2, attention_bias=False, tie_word_embeddings=True,
            hidden_act="gelu_pytorch_tanh", post_norms=True, norms_add_one=True, scale_embeddings=True,
            sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=9,
            attn_logit_softcapping=request.param, final_logit_softcapping=request.param,
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 43, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def without_cache(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(model.logits(model(SegmentBatch.from_documents([ids]))[-1]).argmax().item())
    return ids[len(prompt) :]


# prompts shorter than the window, exactly as long, around several of them; then many windows more
@pytest.mark.parametrize("lengths", [(3, 1), (8, 7, 9), (30, 2, 17, 8), (16,)])
def test_greedy_over_several_windows(model, lengths):
    given = prompts(*lengths)
    expected = [without_cache(model, prompt, 40) for prompt in given]
    assert generate(model, given, max_new_tokens=40, stop_ids=()) == expected


def test_a_ring_gives_the_hidden_states_of_a_cache_of_everything(model):
    """Also when rows leave. The cache of everything has a slot per column, and its window is masked by hand."""
    given = prompts(13, 5, 21)
    caches = [Cache(model, [13, 5, 21], 30, None) for _ in range(2)]
    whole = caches[1]
    whole.slots = [50] * 3
    tried = []

    def mask(slots, dtype, windowed):
        held = whole.columns_held(slots)
        hidden = held < torch.tensor(whole.before)[:, None]
        return hidden | (held <= whole.used - WINDOW) if windowed else hidden

    with torch.inference_mode():
        for cache in caches:
            tried.append([prefill(model, cache, given)])
        tokens = torch.randint(0, 43, (29, 3), generator=torch.Generator().manual_seed(2))
        rows = [0, 1, 2]
        for step in range(29):
            if step == 12:
                rows = [0, 2]
                for cache in caches:
                    cache.keep(rows)
            tried[0].append(decode(model, caches[0], tokens[step, rows]))
            tried[1].append(_decode_masked(model, whole, tokens[step, rows], mask))
    for ring, everything in zip(*tried, strict=True):
        torch.testing.assert_close(ring, everything, rtol=0, atol=1e-5)
    assert [keys.shape[2] for keys in caches[0].keys] == [8, 50, 8]


def _decode_masked(model, cache, tokens, mask):
    def attend(layer, q, k, v):
        asked, keys, values = cache.asked[layer], cache.keys[layer], cache.values[layer]
        keys[:, :, cache.used], values[:, :, cache.used] = k, v
        keys, values = (x[:, :, : cache.used + 1].repeat_interleave(3, dim=1) for x in (keys, values))
        scores = torch.einsum("bhd,bhcd->bhc", q, keys) * asked.scale
        scores = scores if asked.softcap is None else asked.softcap * (scores / asked.softcap).tanh()
        scores = scores.masked_fill(mask(50, q.dtype, asked.window is not None)[:, None], -torch.inf)
        return torch.einsum("bhc,bhcd->bhd", scores.softmax(-1), values)

    hidden = model.run(tokens, cache.lengths, attend)
    cache.used += 1
    return hidden


def test_a_windowed_layer_takes_no_more_than_its_window(model):
    size = 2 * 2 * 4 * 4  # keys and values of two heads of four float32
    for length, new in ((100, 50), (5, 200)):
        cache = Cache(model, [length], new, None)
        with torch.inference_mode():
            prefill(model, cache, prompts(length))
        columns = length + new - 1
        taken = sum(stored.nbytes for stored in (*cache.keys, *cache.values))
        assert taken == size * (WINDOW + columns + WINDOW)  # windowed, full, windowed
        assert taken == cache_bytes(model.config, columns, torch.float32)
    assert cache_bytes(model.config, 4, torch.float32) == size * 4 * 3  # and no more than the text
    assert cache_bytes(model.config, 100, torch.bfloat16) == size // 2 * (WINDOW + 100 + WINDOW)
