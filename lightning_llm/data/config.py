"""Settings of data: where text, conversations and pairs come from, and in which shares they are consumed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_llm.settings import option, refuse_below

GRADED = ("instruction_following", "verbosity", "truthfulness", "harmlessness")  # of a single response (AFM's report)
GRADES = 3  # of each of them (AFM's report)
SHORTEST_CONTEXT = 4  # below it a cut could leave a piece without any target
STAGE = "stage:"  # begins the path of a source whose rows another stage of the recipe makes


@dataclass
class SourceConfig:
    """One source of rows."""

    # A file, glob or folder (jsonl, .gz, .zst, parquet, txt), a folder of `datasets` or of prepared tokens,
    # "hub:<org>/<name>", "embedded:<name>" or "stage:<name>" (rows that a stage makes); none: scale.corpora[<source>]
    path: str | None = None
    weight: Any = 1.0  # share of the consumed tokens, or a ramp [{at: <share of the stage's tokens>, value: ...}]
    columns: dict[str, str] = field(
        default_factory=dict
    )  # our field -> the file's column, where they differ; data.body is nested
    max_rows: int | None = None
    # of a hub: split, config, revision; of `datasets`: split; of text files: documents (file | paragraph)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, is {self.max_rows}; null takes all")


@option("data", "mixture")
@dataclass
class DataConfig:
    """A mixture of sources. `form` says what a row is; text may be mixed into conversations."""

    name: str = "???"
    form: str = "text"  # text | conversations | pairs | rankings | questions | prompts (data/rows.py)
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokens_per_example: float | None = None  # what the plan takes an example (or pair) to cost on average
    max_epochs: float = 4.0  # more passes over a source are refused
    on_error: str = "stop"  # stop | skip: a malformed row
    on_long: str = "drop"  # drop | truncate_left | stop: a conversation or pair longer than the context
    validation: float = 0.02  # share of rows held out, by hash of their content (embedded data hold out their own)


@dataclass
class TokenizerConfig:
    """The byte-level BPE tokenizer trained on the recipe's own text (models that bring a tokenizer ignore it)."""

    vocab_size: int = 2048
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # none: the first stage's and the scale's corpora
    sample_bytes: int = 4_000_000  # of text per source

    def __post_init__(self):
        refuse_below(1, self, "sample_bytes")
