"""A dense model whose hidden units are multiplied with masks that are learnt: soft top-k of a score for each."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_llm.losses.soft_top_k import soft_top_k
from lightning_llm.models.config import ModelConfig
from lightning_llm.models.feed_forward import FeedForward
from lightning_llm.models.transformer import Attend, Transformer

MASKS_FILE = "pruning_masks.safetensors"
UNITS = "intermediate_size"  # in the file's header: how many hidden units of a layer its masks add up to
SMALLEST_DEVIATION = 1e-6


class MaskedFeedForward(FeedForward):
    """down(m * act(gate x) * up x)."""

    mask: Tensor | None = None  # [n]

    def forward(self, x: Tensor) -> Tensor:
        """[.., d] of hidden states [.., d]."""
        assert self.mask is not None, "the model that it is part of sets it in every pass"
        inner = self.act(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner * self.mask.to(inner.dtype))


class MaskedTransformer(Transformer):
    """A transformer that learns which hidden units it can do without (AFM, arXiv 2407.21075, sections 3.2.1 and 5).

    In each layer m = soft_top_k(z / std(z), budget, temperature) of scores z: they are measured by their own deviation,
    so that a temperature means the same at any learning rate. Whoever trains it sets `budget` and `temperature`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        size = config.intermediate_size
        for layer in self.layers:
            layer.mlp = MaskedFeedForward(config)
        self.mask_scores = nn.ParameterList(torch.zeros(size) for _ in self.layers)  # vectors: they do not decay
        self.budget, self.temperature = float(size), 1.0  # all units

    @classmethod
    def from_backbone(cls, backbone: Transformer, seed: int) -> MaskedTransformer:
        """A model that takes over a backbone's parameters; scores are random, by the seed alone.

        Raises:
            ValueError: the backbone is a mixture of experts.
        """
        config = backbone.config
        if config.num_experts:
            raise ValueError(f"num_experts is {config.num_experts}, and only dense models are masked")
        with torch.device("meta"):
            model = cls(config)
        weight = backbone.embed_tokens.weight
        generator = torch.Generator().manual_seed(seed)
        scores = {
            f"mask_scores.{layer}": torch.randn(config.intermediate_size, generator=generator)
            * config.initializer_range
            for layer in range(config.num_hidden_layers)
        }
        model.load_state_dict(
            backbone.state_dict(keep_vars=True) | {name: z.to(weight) for name, z in scores.items()}, assign=True
        )
        model.attention_backend = backbone.attention_backend
        model.activation_checkpointing = backbone.activation_checkpointing
        return model

    @property
    def feed_forwards(self) -> list[MaskedFeedForward]:
        """Of all layers."""
        return [layer.mlp for layer in self.layers]  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]

    def masks(self) -> Tensor:
        """[L, n] in [0, 1], each row adding up to the budget."""
        scores = torch.stack(list(self.mask_scores)).float()
        deviation = scores.std(1, keepdim=True).clamp(min=SMALLEST_DEVIATION)
        return soft_top_k(scores / deviation, self.budget, self.temperature)

    def run(self, input_ids: Tensor, positions: Tensor, attend: Attend, kept: Tensor | None = None) -> Tensor:
        """As `Transformer.run`, with the masks of this pass."""
        for feed_forward, mask in zip(self.feed_forwards, self.masks(), strict=True):
            feed_forward.mask = mask
        return super().run(input_ids, positions, attend, kept)

    @torch.no_grad()
    def folded(self) -> Transformer:
        """The same function as a plain transformer: masks are in the columns of `down`."""
        state = {name: p.detach() for name, p in self.named_parameters() if not name.startswith("mask_scores.")}
        for layer, mask in enumerate(self.masks()):
            name = f"layers.{layer}.mlp.down_proj.weight"
            state[name] = state[name] * mask.to(state[name].dtype)
        with torch.device("meta"):
            plain = Transformer(self.config)
        plain.load_state_dict(state, assign=True)
        return plain

    def save_pretrained(self, directory: str | Path, eos_token_ids: list[int] | None = None) -> None:
        """As `Transformer.save_pretrained`, of the folded model; the scores lie beside it."""
        self.folded().save_pretrained(directory, eos_token_ids)
        scores = {"scores": torch.stack([z.detach() for z in self.mask_scores])}
        save_file(scores, Path(directory) / MASKS_FILE, {UNITS: str(round(self.budget))})


def read_scores(directory: Path) -> Tensor | None:
    """[L, n] of a model that has learnt masks; None: it has not."""
    path = directory / MASKS_FILE
    return load_file(path)["scores"] if path.is_file() else None


def read_units(directory: Path) -> int | None:
    """The hidden units of a layer that masks were learnt for; None: the file does not say, as older ones.

    Raises:
        FileNotFoundError: no masks have been learnt.
    """
    with safe_open(directory / MASKS_FILE, "pt") as file:
        units = (file.metadata() or {}).get(UNITS)
    return None if units is None else int(units)
