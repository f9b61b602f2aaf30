"""A small tokenizer, and token stores made of lengths alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_llm.data.embedded import tasks
from lightning_llm.data.token_store import TokenStoreWriter
from lightning_llm.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    from pydoc_data.topics import topics

    said = [turn["content"] for conversation in tasks.instructions("train", 200) for turn in conversation]
    return train_tokenizer([topics[name] for name in sorted(topics)[:15]] + said + ["user\n assistant\n"] * 50, 512)


@pytest.fixture(scope="session")
def write_store():
    """Write a store of random tokens: `shape` gives a row's length, or the lengths of a pair's three segments."""

    def write(directory: Path, form: str, shape: list, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        writer = TokenStoreWriter(directory, form, 512)
        for lengths in shape:
            segments = [rng.integers(3, 512, n) for n in np.atleast_1d(lengths)]
            masks = None if form == "text" else [rng.random(len(ids)) < 0.5 for ids in segments]
            if form == "pairs" and masks:
                masks[0][:] = False
            writer.append(segments, masks)
        writer.close()

    return write
