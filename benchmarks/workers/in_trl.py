"""TRL's trainers as they come, in float32 and without gradient checkpointing, which would only cost them time."""

from __future__ import annotations

from typing import Any

import torch
from calls import Calls, serve


def load(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tokenizer(calls: Calls) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(calls.settings["model"])


def driven(base: type, calls: Calls) -> type:
    """A trainer that waits for a call before it draws a batch, and answers with the loss after each step."""
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    class Answers(TrainerCallback):
        """The clock runs from the end of one step to the end of the next: collation is in it."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            calls.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            calls.done(loss=Driven.last.item())
            calls.wait()

    class Driven(base):
        last: torch.Tensor

        def __init__(self, **parts: Any):
            super().__init__(**parts, callbacks=[Answers()])

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # it holds token ids already

        def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *parts: Any, **named: Any) -> torch.Tensor:
            loss = super().compute_loss(*parts, **named)
            Driven.last = loss.detach()
            return loss

    return Driven


def arguments(calls: Calls, rows: int) -> dict[str, Any]:
    """The settings of our own optimizer; the rest as it comes."""
    return dict(
        output_dir="out",
        per_device_train_batch_size=rows,
        num_train_epochs=1,
        learning_rate=calls.settings["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def sft(calls: Calls) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    calls.before_building()
    batches = calls.settings["conversations"]
    rows = [
        {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        for batch in batches
        for prompt, answer in batch
    ]
    trainer = driven(SFTTrainer, calls)(
        model=load(calls.settings["model"]),
        args=SFTConfig(**arguments(calls, len(batches[0]))),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(calls),
    )
    trainer.train()


def dpo(calls: Calls) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    calls.before_building()
    batches = calls.settings["pairs"]
    rows = [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for batch in batches
        for prompt, chosen, rejected in batch
    ]
    trainer = driven(DPOTrainer, calls)(
        model=load(calls.settings["model"]),
        ref_model=load(calls.settings["reference"]),
        args=DPOConfig(
            beta=calls.settings["beta"],
            precompute_ref_log_probs=calls.settings.get("precomputed", False),
            **arguments(calls, len(batches[0])),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(calls),
    )
    trainer.train()


def reward(calls: Calls) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    calls.before_building()
    batches = calls.settings["pairs"]
    rows = [
        {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        for batch in batches
        for prompt, chosen, rejected in batch
    ]
    trainer = driven(RewardTrainer, calls)(
        model=AutoModelForSequenceClassification.from_pretrained(calls.settings["model"], dtype=torch.float32),
        args=RewardConfig(**arguments(calls, len(batches[0]))),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(calls),
    )
    trainer.train()


if __name__ == "__main__":
    serve({job.__name__: job for job in (sft, dpo, reward)}, ["transformers", "trl", "accelerate"])
