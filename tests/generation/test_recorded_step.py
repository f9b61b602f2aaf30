"""Steps of one shape for all, as a GPU's graphs are, beside steps of the rows in use: the same hidden states, tokens
and log-probabilities."""

import pytest
import torch

from lightning_llm.generation import engine
from lightning_llm.generation.cache import Cache, decode, prefill
from lightning_llm.generation.config import DualChunkConfig, Sampling
from lightning_llm.generation.dual_chunk import DualChunk
from lightning_llm.generation.recorded_step import FEWEST, GRAPHS, RecordedStep, can_be_recorded
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.config import LayerAttention

WINDOW = 24
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # what compiles flex warns on its own account
]


class Windowed(ModelConfig):
    """Every other layer with a window."""

    def layer_attention(self, layer):
        return LayerAttention(None if layer % 2 else WINDOW, None, None)


def build(config=Windowed, **sizes):
    tiny = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3}
    model = Transformer(config(name="tiny", num_attention_heads=4, num_key_value_heads=2, **(tiny | sizes))).eval()
    model.reset_parameters(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)  # texts that do not repeat themselves
    return model


def prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 61, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def test_steps_of_one_shape_are_those_of_the_rows_in_use(monkeypatch):
    monkeypatch.setattr("lightning_llm.generation.recorded_step.SHORTEST", 4)  # several lengths in this one text
    model = build()
    caches = [Cache(model, 4, 80) for _ in range(2)]
    recorded = RecordedStep(model, caches[0])
    assert recorded.between == -(-80 // GRAPHS // 4) * 4 == 8
    for cache in caches:
        prefill(model, cache, prompts(5, 30, 17), [1, 1, 1])
    generator = torch.Generator().manual_seed(2)
    for number in range(40):
        if number == 12:  # a row is nobody's for a while, then one with more behind it
            for cache in caches:
                cache.remove(0)
        if number == 20:
            for cache in caches:
                prefill(model, cache, prompts(3, 26), [1, 1])
        tokens = torch.randint(0, 61, (len(caches[0].lengths),), generator=generator)
        torch.testing.assert_close(recorded.decode(tokens), decode(model, caches[1], tokens), rtol=1e-5, atol=1e-5)
        assert caches[0].lengths == caches[1].lengths


def samples(model, is_recorded, monkeypatch, **options):
    monkeypatch.setattr("lightning_llm.generation.recorded_step.SHORTEST", 16)
    monkeypatch.setattr(engine, "can_be_recorded", lambda *_: is_recorded)
    limits = [3 + 5 * (number % 12) for number in range(24)]
    return engine.sample(
        model, prompts(*range(2, 26, 2)), samples=2, max_new_tokens=limits, stop_ids=(), batch_size=8, **options
    )


@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "fp32"), pytest.param("cuda", "fp32", marks=ON_GPU), pytest.param("cuda", "bf16", marks=ON_GPU)],
)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=20, repetition_penalty=1.1)])
def test_responses_come_and_go(device, precision, sampling, monkeypatch):
    """In bf16 another order of sums soon draws another token: log-probabilities of what is alike until then."""
    model, is_exact = build().to(device), precision == "fp32"
    with torch.autocast(device, torch.bfloat16, enabled=not is_exact):
        found, expected = (samples(model, it, monkeypatch, sampling=sampling) for it in (True, False))
    alike = [common(ours.ids, theirs.ids) for ours, theirs in zip(found, expected, strict=True)]
    assert sum(alike) >= (sum(len(theirs.ids) for theirs in expected) if is_exact else 5 * len(expected))
    for ours, theirs, count in zip(found, expected, alike, strict=True):
        logps = torch.tensor(ours.logps[:count]), torch.tensor(theirs.logps[:count])
        torch.testing.assert_close(*logps, rtol=0, atol=1e-4 if is_exact else 0.15)


def common(ours, theirs):
    """Tokens until the first that differs."""
    return next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(theirs))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
@torch.inference_mode()
def test_a_graph_for_each_length(device):
    model = build().to(device)
    cache = Cache(model, 2, 300)
    recorded = RecordedStep(model, cache)
    prefill(model, cache, prompts(100), [2])
    for _ in range(60):
        recorded.decode(torch.tensor([1, 2]))
    assert list(recorded.graphs) == [128, 256]


@pytest.mark.parametrize(
    ("changes", "chunks"),
    [
        (
            {
                "family": "qwen2_moe",
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 8,
                "shared_expert_intermediate_size": 8,
            },
            None,
        ),
        ({}, DualChunkConfig(chunk_size=32, local_size=8)),
    ],
)
def test_what_looks_at_numbers_on_the_way_is_not_recorded(changes, chunks):
    model = build(ModelConfig, **changes)
    cache = Cache(model, 2, 20, DualChunk(chunks, torch.ones(8)) if chunks else None)
    cache.device = torch.device("cuda")
    assert not can_be_recorded(model, cache, 100)
    plain = Cache(build(), 2, 20)
    assert not can_be_recorded(build(), plain, 100)  # nothing is, off a GPU
    plain.device = torch.device("cuda")
    assert can_be_recorded(build(), plain, FEWEST)
    assert not can_be_recorded(build(), plain, FEWEST - 1)


@torch.inference_mode()
def test_where_nothing_can_be_recorded_steps_go_on_without(monkeypatch):
    model = build()
    caches = [Cache(model, 2, 40) for _ in range(2)]
    recorded = RecordedStep(model, caches[0])

    def fails(longest):
        raise RuntimeError("operation not permitted when stream is capturing\nand more of it")

    monkeypatch.setattr(recorded, "_record", fails)
    for cache in caches:
        prefill(model, cache, prompts(9), [1])
    recorded.inputs[:, 0] = torch.tensor([7, 9])
    with pytest.warns(UserWarning, match=r"kernel by kernel: .* \(operation not permitted when stream is capturing\)"):
        first = recorded._replay(40)
    torch.testing.assert_close(first[:1], decode(model, caches[1], torch.tensor([7])), rtol=1e-5, atol=1e-5)
    recorded._replay(40)  # and says it once: a warning is an error here
