"""Which backend is taken, what is said about it, and what is refused."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_llm.models.attention import Request, Segments, attention, choice, choose_backend, explain, flash
from lightning_llm.pipeline import checks
from lightning_llm.settings import UserError

CPU = Request("cpu", torch.float32, 64)
H100 = Request("cuda", torch.bfloat16, 128, capability=(9, 0))


@pytest.fixture(autouse=True)
def _fresh_choices():
    """Choices are remembered; a test changes what is installed."""
    yield
    choose_backend.cache_clear()
    flash.load_kernel.cache_clear()


@pytest.fixture
def _gpu_software(monkeypatch):
    """As on a GPU machine, without flash-attn: these facts are asked of torch, not of a request."""
    choose_backend.cache_clear()
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr("lightning_llm.models.attention.flex.has_triton", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_the_setting_knows_all_backends():
    assert set(checks.ATTENTION) == {"auto", *choice.BACKENDS}
    assert all(sorted(order) == sorted(choice.BACKENDS) for order in choice.ORDER.values())


def test_an_unknown_backend_is_refused():
    q, k = torch.randn(6, 2, 4), torch.randn(6, 1, 4)
    with pytest.raises(UserError, match="'flesh' is not a backend"):
        attention(q, k, k, Segments([6], [-1]), backend="flesh")


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 50.0}, {"needs_gradient": False}])
def test_a_cpu_has_sdpa_for_everything(options):
    assert choose_backend("auto", replace(CPU, **options)) == "sdpa"
    assert explain("auto", [replace(CPU, **options)]) == "attention by sdpa (the fastest on a CPU, and trains)"


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("flash", "flash needs an NVIDIA GPU"),
        ("varlen", "varlen needs an NVIDIA GPU"),
        ("flex", "flex has no gradients on a CPU"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused_not_replaced(backend, reason):
    q = torch.randn(6, 2, 16, requires_grad=True)
    with pytest.raises(UserError, match=reason):
        attention(q, q, q, Segments([6], [-1]), backend=backend)


@pytest.mark.usefixtures("_gpu_software")
@pytest.mark.parametrize(
    ("request_", "name", "reason"),
    [
        (H100, "varlen", "flash is not installed: pip install 'lightning-llm[flash]'"),
        (replace(H100, softcap=50.0), "flex", "varlen has no soft-capping"),
        (replace(H100, dtype=torch.float32), "flex", "varlen computes in fp16 and bf16, not in float32"),
        (replace(H100, head_size=320), "flex", "takes head sizes up to 256 that are multiples of 8, not 320"),
        (replace(H100, head_size=4), "sdpa", "flex takes head sizes from 16, not 4"),
        (replace(H100, dtype=torch.float64), "sdpa", "flex computes in fp32, fp16 and bf16, not in float64"),
        (replace(H100, capability=(7, 5)), "flex", "of compute capability 8.0 or more (Ampere), this one has 7.5"),
    ],
)
def test_a_gpu_has_the_fastest_that_can_and_says_why(request_, name, reason):
    assert choose_backend("auto", request_) == name
    line = explain("auto", [request_])
    assert line.startswith(f"attention by {name} (")
    assert reason in line
    assert "\n" not in line


def test_what_is_printed_with_flash_attn_claims_no_more_than_was_measured(tmp_path, monkeypatch):
    """On rows of one length `sdpa` is faster: benchmarks/results/gpu.json."""
    choose_backend.cache_clear()
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("def flash_attn_varlen_func(): ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    line = "attention by flash (the fastest on a GPU for documents of unlike length)"
    assert explain("auto", [H100]) == line
    assert explain("flash", [H100]) == "attention by flash (as asked)"
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu.json"
    batches = json.loads(results.read_text())["attention"]["batches"]
    fastest = {
        name: min(batch["found"], key=lambda way: batch["found"][way]["seconds"]["median"])
        for name, batch in batches.items()
    }
    assert fastest["mixed documents"] == fastest["prompts with 8 responses"] == choice.ORDER["cuda"][0]
    assert fastest["full rows"] == fastest["one document"] == "sdpa"


@pytest.mark.usefixtures("_gpu_software")
def test_layers_that_ask_for_different_things_are_one_line():
    line = explain("auto", [H100, replace(H100, softcap=50.0), H100])
    assert line.startswith("attention by varlen and flex (flash is not installed")
    assert line.count("is not installed") == 1


@pytest.mark.usefixtures("_gpu_software")
def test_an_absent_package_that_was_asked_for_is_refused():
    with pytest.raises(UserError, match="flash is not installed"):
        choose_backend("flash", H100)


@pytest.mark.parametrize("backend", ["auto", "flash"])
def test_an_installed_but_broken_package_is_an_error(tmp_path, monkeypatch, backend):
    choose_backend.cache_clear()
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c105Error')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    with pytest.raises(UserError, match=r"installed but broken \(ImportError: undefined symbol"):
        choose_backend(backend, H100)
