"""What attention is reckoned to cost, against the batches of a real run."""

import json

import pytest

from lightning_llm.data.config import DataConfig, SourceConfig
from lightning_llm.data.packing import StageData
from lightning_llm.models.families import read_config
from lightning_llm.models.size import training_flops


@pytest.mark.parametrize("name", ["pretrain", "sft", "dpo"])
def test_a_stage_counts_the_segments_that_its_batches_attend(run_folder, name):
    folder = run_folder / "artifacts" / name
    record = json.loads((folder / "stage.json").read_text())
    settings = record["settings"]
    sources = {source: SourceConfig(**given) for source, given in settings["data"].pop("sources").items()}
    data = StageData(
        run_folder / "artifacts" / f"{name}.prepare",
        DataConfig(**settings["data"], sources=sources),
        context_ramp=settings["context"],
        batch_ramp=settings["batch_tokens"],
        total_tokens=settings["tokens"],
        seed=settings["seed"],
        token_columns={"reference_logps": run_folder / "artifacts" / "dpo.reference"} if name == "dpo" else {},
    )
    tokens, segments = 0, []
    for step in range(data.steps):
        window = data.window(step, micro_batch_tokens=10**9)
        if sum(window.consumed.values()):  # a step smaller than a document may have none
            seen = [
                (length, batch.lengths[prefix] if prefix >= 0 else 0)
                for batch in window.mine
                for length, prefix in zip(batch.lengths, batch.prefixes, strict=True)
            ]
            assert sorted(window.segments) == sorted(seen)
            tokens, segments = tokens + sum(window.consumed.values()), segments + seen
    assert sum(length for length, _ in segments) == tokens
    expected = training_flops(read_config(folder / "model"), segments)
    assert record["flops"] == pytest.approx(expected, rel=1e-9)
