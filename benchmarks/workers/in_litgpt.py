"""LitGPT's model and its chunked loss in a plain loop. Documents of equal length only: it neither pads nor masks."""

from __future__ import annotations

import json
from pathlib import Path

import plain_loop
import torch
from calls import Calls, serve


def load(folder: Path):
    """A Llama directory as LitGPT's own conversion reads it."""
    from litgpt import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from safetensors.torch import load_file

    shape = json.loads((folder / "config.json").read_text())
    config = Config(
        name="llama",
        block_size=shape["max_position_embeddings"],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"],
        n_embd=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        norm_eps=shape["rms_norm_eps"],
        rope_base=shape["rope_theta"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(folder / "model.safetensors"))
    model.load_state_dict(weights)
    model.transformer.wte.weight = model.lm_head.weight  # tied, as its pre-training does it
    return model


def pretrain(calls: Calls) -> None:
    from litgpt.utils import chunked_cross_entropy

    calls.before_building()
    model = load(Path(calls.settings["model"]))
    model.max_seq_length = len(calls.settings["documents"][0][0])
    run = torch.compile(model) if calls.settings.get("compile") else model
    batches = calls.settings["documents"]

    def loss_of(index: int) -> torch.Tensor:
        rows = torch.tensor(batches[index])
        targets = rows.roll(-1, 1)
        targets[:, -1] = plain_loop.IGNORED
        return chunked_cross_entropy(run(rows), targets)

    plain_loop.train(calls, model, loss_of)


if __name__ == "__main__":
    serve({"pretrain": pretrain}, ["litgpt"])
