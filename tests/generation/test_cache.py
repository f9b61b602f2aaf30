"""The ring of a windowed layer: as much memory as the window, and what a cache of everything gives."""

import pytest
import torch

from lightning_llm.generation.cache import Cache, cache_bytes, decode, prefill
from lightning_llm.generation.config import DualChunkConfig
from lightning_llm.generation.engine import generate
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.config import LayerAttention
from lightning_llm.settings import UserError

WINDOW = 8


class Windowed(ModelConfig):
    """Every other layer with a window, all of them soft-capped or not, scores scaled as no other model's."""

    softcap: float | None = None

    def layer_attention(self, layer):
        return LayerAttention(None if layer % 2 else WINDOW, self.softcap, 0.3)


@pytest.fixture(scope="module", params=[None, 3.0], ids=["uncapped", "capped"])
def model(request):
    config = Windowed(
        name="tiny", vocab_size=43, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2,
    )  # fmt: skip
    config.softcap = request.param
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model


def prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 43, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def without_cache(model, prompt, count):
    """Greedy, the whole text anew for each token, every score of every pair."""

    def attend(layer, q, k, v):
        asked, tokens = model.config.layer_attention(layer), torch.arange(len(q))
        k, v = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
        scores = torch.einsum("ihd,jhd->hij", q, k) * asked.scale
        scores = scores if asked.softcap is None else asked.softcap * (scores / asked.softcap).tanh()
        distance = tokens[:, None] - tokens
        scores = scores.masked_fill((distance < 0) | (distance >= (asked.window or len(q))), -torch.inf)
        return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)

    ids = list(prompt)
    for _ in range(count):
        hidden = model.run(torch.tensor(ids), torch.arange(len(ids)), attend)
        ids.append(model.logits(hidden[-1]).argmax().item())
    return ids[len(prompt) :]


# prompts shorter than the window, exactly as long, around several of them; then many windows more
@pytest.mark.parametrize("lengths", [(3, 1), (8, 7, 9), (30, 2, 17, 8), (16,)])
def test_greedy_over_several_windows(model, lengths):
    given = prompts(*lengths)
    expected = [without_cache(model, prompt, 40) for prompt in given]
    assert generate(model, given, max_new_tokens=40, stop_ids=()) == expected
    assert len({token for response in expected for token in response}) > 10  # there was something to choose


def test_a_ring_gives_the_hidden_states_of_a_cache_of_everything(model):
    """Also when requests leave and others take their rows. The cache of everything has a slot for each position, and
    its window is masked by hand."""
    given, late = prompts(13, 5, 21), prompts(4, 11)
    ring, everything = (Cache(model, 3, 50) for _ in range(2))
    everything.slots = [50] * 3
    tokens = torch.randint(0, 43, (29, 3), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        for cache in (ring, everything):
            prefill(model, cache, given, [1, 1, 1])
        tried = [], []
        for step in range(29):
            if step == 12:
                for cache in (ring, everything):
                    cache.remove(0)
                assert ring.lengths == [33, 17]  # the last has moved
            if step == 15:
                for cache in (ring, everything):
                    cache.remove(1)
                    prefill(model, cache, late, [1, 1])
                assert ring.lengths == [36, 4, 11]
            rows = len(ring.lengths)
            tried[0].append(decode(model, ring, tokens[step, :rows]))
            tried[1].append(_decode_masked(model, everything, tokens[step, :rows]))
    for one, other in zip(*tried, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert [keys.shape[2] for keys in ring.keys] == [8, 50, 8]


def _decode_masked(model, cache, tokens):
    newest, rows = torch.tensor(cache.lengths)[:, None], torch.arange(len(tokens))

    def attend(layer, q, k, v):
        asked, keys, values = cache.asked[layer], cache.keys[layer], cache.values[layer]
        keys[rows, :, newest[:, 0]], values[rows, :, newest[:, 0]] = k, v
        keys, values = (x[: len(tokens)].repeat_interleave(3, dim=1) for x in (keys, values))
        scores = torch.einsum("bhd,bhcd->bhc", q, keys) * asked.scale
        scores = scores if asked.softcap is None else asked.softcap * (scores / asked.softcap).tanh()
        hidden = (torch.arange(50) > newest) | (torch.arange(50) <= newest - (asked.window or 50))
        return torch.einsum("bhc,bhcd->bhd", scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1), values)

    hidden = model.run(tokens, newest[:, 0], attend)
    cache.lengths = [length + 1 for length in cache.lengths]
    return hidden


def test_copies_of_a_prompt_are_rows_of_their_own(model):
    """A prompt computed once for three, and each went on with by itself, is three prompts."""
    given, tokens = prompts(11, 6), torch.arange(5)
    once, each = Cache(model, 5, 20), Cache(model, 5, 20)
    with torch.inference_mode():
        hidden = prefill(model, once, given, [3, 2]).repeat_interleave(torch.tensor([3, 2]), dim=0)
        expected = prefill(model, each, [given[0]] * 3 + [given[1]] * 2, [1] * 5)
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
        for _ in range(3):
            hidden, expected = decode(model, once, tokens), decode(model, each, tokens)
            torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(hidden[0], hidden[1], atol=1e-2)


def test_dual_chunks_of_windows_are_refused(model):
    with pytest.raises(UserError, match="sliding window"):
        generate(model, prompts(3), max_new_tokens=1, stop_ids=(), dual_chunk=DualChunkConfig(12))


def test_a_windowed_layer_takes_no_more_than_its_window(model):
    size = 2 * 2 * 4 * 4  # keys and values of two heads of four float32
    for length, new in ((100, 50), (5, 200)):
        cache = Cache(model, 1, length + new - 1)
        with torch.inference_mode():
            prefill(model, cache, prompts(length), [1])
        columns = length + new - 1
        taken = sum(stored.nbytes for stored in (*cache.keys, *cache.values))
        assert taken == size * (WINDOW + columns + WINDOW)  # windowed, full, windowed
        assert taken == cache_bytes(model.config, columns, torch.float32)
    assert cache_bytes(model.config, 4, torch.float32) == size * 4 * 3  # and no more than the text
    assert cache_bytes(model.config, 100, torch.bfloat16) == size // 2 * (WINDOW + 100 + WINDOW)
