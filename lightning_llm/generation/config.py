"""Settings of generation: how long, how tokens are drawn, what ends a reply, how a long text is read."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

TEMPLATES = ("auto", "chat", "raw")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the values here but `temperature` leave the model's own distribution as it is."""

    temperature: float = 0.0  # logits are divided by it; 0 takes the likeliest token
    top_k: int = 0  # only so many of the likeliest tokens are drawn from; 0: all
    top_p: float = 1.0  # only the fewest likeliest tokens whose probabilities reach it are drawn from
    min_p: float = 0.0  # only tokens at least so likely, relative to the likeliest, are drawn from
    repetition_penalty: float = 1.0  # of tokens that prompt or reply have already; greedy, too

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, is {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, is {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], is {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], is {self.min_p}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be positive, is {self.repetition_penalty}")


@dataclass
class SamplingConfig:
    """How a stage draws responses: the policy itself, unless something is cut off."""

    temperature: float = 1.0  # logits are divided by it; 0 takes the likeliest token
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        self.resolved()

    @property
    def sure_by(self) -> str | None:
        """What makes each token certain, if anything does."""
        if not self.temperature:
            return "sampling.temperature is 0"
        return next((f"sampling.{name} is 1" for name in ("top_k", "min_p") if getattr(self, name) == 1), None)

    @property
    def draws_from_model(self) -> bool:
        """Whether responses come from the model's own distribution: at temperature 1, with nothing cut off."""
        return self == SamplingConfig()

    def resolved(self) -> Sampling:
        """What the engine is given.

        Raises:
            ValueError: a number is out of range.
        """
        return Sampling(**vars(self))


@dataclass
class DualChunkConfig:
    """Dual chunk attention (An et al. 2024, arXiv 2402.17463): text longer than the model knows positions for.

    Keys are counted anew in every chunk of `chunk_size - local_size` tokens, so that no distance reaches `chunk_size`.
    """

    chunk_size: int | None = None  # positions that the model knows (the paper's c); none: ordinary attention
    local_size: int | None = None  # distances kept across a chunk's border (the paper's w); none: chunk_size / 4

    def __post_init__(self):
        if self.chunk_size is None:
            if self.local_size is not None:
                raise ValueError("local_size means nothing without chunk_size")
        elif not 0 < self.local < self.chunk_size:
            raise ValueError(f"local_size must lie between 0 and chunk_size ({self.chunk_size}), is {self.local}")

    @property
    def local(self) -> int:
        """w, in tokens."""
        assert self.chunk_size is not None
        return self.chunk_size // 4 if self.local_size is None else self.local_size

    @property
    def period(self) -> int:
        """s = c - w, in tokens: after so many, positions of keys begin anew."""
        assert self.chunk_size is not None
        return self.chunk_size - self.local


@dataclass
class GenerationConfig:
    """What `generate` and `chat` have in common. None: as the model's generation_config.json says, or greedy."""

    max_new_tokens: int = 256  # a reply is cut after so many
    temperature: float | None = None  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: list[str] = field(default_factory=list)  # strings that end a reply and are left out of it
    seed: int = 0  # of sampling; a reply depends on it and on the prompt's place, not on its batch
    system: str | None = None  # what a conversation begins with
    rope_scaling: Any = None  # in the place of the model's, as {rope_type: linear | llama3 | yarn, factor: ..., ...}
    dual_chunk: DualChunkConfig = field(default_factory=DualChunkConfig)

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, is {self.max_new_tokens}")
        if "" in self.stop:
            raise ValueError("an empty stop string would end every reply before it begins")
        self.sampling({})

    def sampling(self, defaults: dict[str, Any]) -> Sampling:
        """How tokens are drawn.

        Args:
            defaults: the content of generation_config.json. Where it does not sample (`do_sample`), only its penalty
                counts, as in transformers.

        Raises:
            ValueError: a number is out of range, or in `defaults` no number; names it first.
        """
        names = [setting.name for setting in fields(Sampling)]
        does_sample = defaults.get("do_sample") or False
        if not isinstance(does_sample, bool):
            raise ValueError(f"do_sample should be true or false, is {does_sample!r}")
        of_model = {name: defaults.get(name) for name in (names if does_sample else ("repetition_penalty",))}
        for name, value in of_model.items():
            kinds = int if name == "top_k" else (int, float)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                kind = "a whole number" if name == "top_k" else "a number"
                raise ValueError(f"{name} should be {kind}, is {value!r}")
        of_user = {name: getattr(self, name) for name in names}
        values: dict[str, Any] = {"temperature": float(does_sample)}
        for given in (of_model, of_user):
            values |= {name: value for name, value in given.items() if value is not None}
        return Sampling(**values)
