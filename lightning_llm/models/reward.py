"""The backbone with a scalar head: what a response is worth, read at its last token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.config import GRADES
from lightning_llm.models import families
from lightning_llm.models.config import ModelConfig
from lightning_llm.models.size import ScoreHead
from lightning_llm.models.transformer import Transformer

GRADING_FILE = "grading_heads.safetensors"


class RewardModel(Transformer):
    """A transformer without a vocabulary's head: `score` is one linear map to a number.

    With `graded` it has a small network for each thing that people grade in a single response, which training alone
    uses (AFM). Its files open as the family's `...ForSequenceClassification`; the networks lie beside them.
    """

    head = families.CLASSIFIER

    def __init__(self, config: ModelConfig, graded: Sequence[str] = ()):
        super().__init__(config)
        self.lm_head = None
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.grading = build_grading(config.hidden_size, graded)

    @classmethod
    def from_backbone(cls, backbone: Transformer, seed: int, graded: Sequence[str] = ()) -> RewardModel:
        """A reward model that takes over a backbone's parts; its heads are random, by the seed alone."""
        with torch.device("meta"):
            model = cls(backbone.config, graded)
        model.embed_tokens, model.layers, model.norm = backbone.embed_tokens, backbone.layers, backbone.norm
        model.attention_backend = backbone.attention_backend
        model.activation_checkpointing = backbone.activation_checkpointing
        weight = backbone.embed_tokens.weight
        generator = torch.Generator().manual_seed(seed)
        for part in (model.score, model.grading):
            part.to(weight.dtype).to_empty(device=weight.device)
            for parameter in part.parameters():
                if parameter.ndim >= 2:
                    drawn = torch.randn(parameter.shape, generator=generator) * backbone.config.initializer_range
                    parameter.data.copy_(drawn)
                else:
                    parameter.data.zero_()
        return model

    def read(self, batch: SegmentBatch, index: Tensor | None = None) -> Tensor:
        """Hidden states [S, d] that heads are applied to.

        Args:
            index: positions in the batch's tokens [S]; None: the last token of each segment. A response's last is that
                of all that stands before it, too; a prompt's says how good a conversation is so far.
        """
        last = batch.cu_seqlens[1:].long() - 1 if index is None else index
        return self(batch)[last]

    def scores(self, batch: SegmentBatch, index: Tensor | None = None) -> Tensor:
        """Reward of each segment [S], in units of its own; arguments as of `read`."""
        return self.score(self.read(batch, index)).squeeze(-1)

    @property
    def score_head(self) -> ScoreHead:
        """Its head as `models/size.py` counts it."""
        return ScoreHead(len(self.grading))

    @property
    def head_weight(self) -> Tensor:
        """There is none.

        Raises:
            TypeError: always.
        """
        raise TypeError("a reward model has no vocabulary's head")

    def _stored(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in super()._stored().items() if not name.startswith("grading.")}

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype = torch.float32) -> Self:
        """As `Transformer.from_pretrained`; the grading networks come back too, if their file is there."""
        model = super().from_pretrained(directory, dtype)
        if (path := Path(directory) / GRADING_FILE).is_file():
            stored = load_file(path)
            model.grading = build_grading(
                model.config.hidden_size, dict.fromkeys(name.partition(".")[0] for name in stored)
            )
            model.grading.load_state_dict(stored)
            model.grading.to(dtype)
        return model

    def save_pretrained(self, directory: str | Path, eos_token_ids: list[int] | None = None) -> None:
        """As `Transformer.save_pretrained`, and the grading networks beside it."""
        super().save_pretrained(directory, eos_token_ids)
        if len(self.grading):
            save_file(self.grading.state_dict(), Path(directory) / GRADING_FILE)


def build_grading(width: int, graded: Iterable[str]) -> nn.ModuleDict:
    """A network of two layers from hidden states [.., width] to logits [.., GRADES], for each thing that is graded."""
    return nn.ModuleDict(
        {name: nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, GRADES)) for name in graded}
    )
