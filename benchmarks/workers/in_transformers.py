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


def generate(calls: Calls) -> None:
    """As many prompts at a time as there are places; a batch runs until its longest response is whole."""
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    class Limits(StoppingCriteria):
        """Ends each response at its own length."""

        def __init__(self, prompt: int, limits: torch.Tensor):
            self.ends = prompt + limits

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
            return input_ids.shape[1] >= self.ends

    calls.before_building()
    model = AutoModelForCausalLM.from_pretrained(calls.settings["model"], dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    samples, places = calls.settings["samples"], calls.settings["places"] // calls.settings["samples"]
    for index in calls:
        prompts, limits = torch.tensor(calls.settings["prompts"][index]), torch.tensor(calls.settings["limits"][index])
        tokens = 0
        for first in range(0, len(prompts), places):
            ids = prompts[first : first + places]
            ends = limits[first * samples : (first + places) * samples]
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=int(ends.max()),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=samples,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Limits(ids.shape[1], ends)]),
            )
            assert out.shape == (len(ends), ids.shape[1] + int(ends.max()))
            tokens += int(ends.sum())
        calls.done(tokens=tokens)


if __name__ == "__main__":
    serve({"pretrain": pretrain, "generate": generate}, ["transformers"])
