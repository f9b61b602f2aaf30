"""What a merge costs is measured in processes of their own, and stands on the page as the result has it."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")
PAGE = Path(__file__).parents[2] / "docs" / "methods" / "averaging.md"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from Linux's /proc")
def test_every_method_is_measured(tmp_path, monkeypatch):
    import merging  # pyright: ignore[reportMissingImports]

    from lightning_llm.models import ModelConfig

    tiny = ModelConfig(
        name="tiny", family="llama", vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, attention_bias=False, tie_word_embeddings=True,
    )  # fmt: skip
    monkeypatch.setattr(merging, "MODEL", tiny)
    monkeypatch.setattr(merging, "TRIALS", [("linear", 2), ("ties", 2)])
    result = merging.measure(tmp_path)
    assert [each["method"] for each in result["merges"]] == ["linear", "ties"]
    assert result["largest_tensor_bytes"] == 4 * 64 * 16
    assert all(each["seconds"] > 0 for each in result["merges"])
    assert merging.table(result)[3].startswith("| `ties` | 2 | ")


def test_the_page_has_the_figures_of_the_result():
    import claims  # pyright: ignore[reportMissingImports]
    import merging  # pyright: ignore[reportMissingImports]
    import trials  # pyright: ignore[reportMissingImports]

    result = trials.read(claims.RESULTS / "merging.json")
    assert "\n".join(merging.table(result)) in PAGE.read_text("utf-8")
