"""transformers' Llama with its own loss in a plain loop. Documents of unlike length are padded on the right."""

from __future__ import annotations

import plain_loop
import torch
from calls import Calls, serve


def pretrain(calls: Calls) -> None:
    from transformers import AutoModelForCausalLM

    calls.before_building()
    model = AutoModelForCausalLM.from_pretrained(calls.settings["model"], dtype=torch.float32)
    model.train()
    run = torch.compile(model) if calls.settings.get("compile") else model
    batches = calls.settings["documents"]

    def loss_of(index: int) -> torch.Tensor:
        rows = batches[index]
        longest = max(map(len, rows))
        if all(len(row) == longest for row in rows):
            ids = torch.tensor(rows)
            return run(input_ids=ids, labels=ids, use_cache=False).loss
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        labels = ids.masked_fill(mask == 0, plain_loop.IGNORED)
        return run(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss

    plain_loop.train(calls, model, loss_of)


if __name__ == "__main__":
    serve({"pretrain": pretrain}, ["transformers"])
