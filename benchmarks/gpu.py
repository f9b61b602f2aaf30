"""Kernels, training steps and sampling on one NVIDIA GPU, in bf16; writes results/gpu.json.

    python benchmarks/gpu.py [attention training distillation vocabulary generation] [--small]

Wall time between synchronisations, all ways on the same inputs and weights, call by call in turns. The peer is
transformers in a plain loop, in this process; of the vocabulary torch's linear cross-entropy and Liger's too, where
they are there. Nothing is written unless losses agree. `--small` tries the script on any device and writes nothing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import importlib.util
import re
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import claims
import machine
import numpy as np
import torch
from interleave import quartiles, require_close
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.teacher import IDS, LOG_P
from lightning_llm.generation import engine
from lightning_llm.generation.config import Sampling
from lightning_llm.generation.engine import sample
from lightning_llm.losses.likelihood import token_log_likelihood
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.attention import BACKENDS, Request, Segments, attention, capability
from lightning_llm.models.compilation import compile_parts
from lightning_llm.models.size import attended_pairs, training_flops
from lightning_llm.objectives.config import CausalLMConfig, DistillationConfig, ObjectiveConfig
from lightning_llm.optimization.config import AdamWConfig
from lightning_llm.optimization.window import optimizer_step

IGNORED = -100
OPTIMIZER = AdamWConfig()
LEARNING_RATE = 0.0  # a step is as much work, and all ways' losses are of the same weights however many came before
KEPT = (1, 8, 64)  # ids of a teacher
LOSSES_DIFFER = 1e-2  # relative, by bf16 and the order of sums
KERNELS = {"triton": "triton", "flash-attn": "flash_attn", "liger-kernel": "liger_kernel"}  # package -> module
Call = Callable[[], float | None]


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    device: str
    model: str  # of conf/model
    shape: Mapping[str, int]  # what is changed of it
    tokens: int  # of a training step and of a batch of attention
    documents: int  # of one length, together `tokens`
    heads: tuple[int, int, int]  # of attention: queries', keys', size
    hidden: tuple[int, int, int]  # of the vocabulary: tokens, width, vocabulary
    prompts: tuple[int, int, int]  # of generation: how many, their tokens, new ones
    calls: int
    flops_per_second: float | None  # dense bf16, of the vendor's data sheet

    @property
    def long(self) -> int:
        """Tokens of a document."""
        return self.tokens // self.documents


LARGE = Size(
    "cuda", "qwen2_0_5b", {}, 16_384, 8, (32, 8, 128), (8192, 1536, 151_936), (64, 512, 128), 10, 9.89e14
)  # fmt: skip
SMALL = Size(
    "cuda" if torch.cuda.is_available() else "cpu",
    "qwen2_0_5b",
    {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 512},
    512, 4, (4, 2, 32), (128, 32, 512), (4, 16, 8), 2, None,
)  # fmt: skip


# ---- measuring


def in_turns(ways: Mapping[str, Call], size: Size) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Seconds and peak memory of each way -> figures, and why some did not run.

    A way is called twice before anything is timed; what it returned the first time is its `loss`.
    """
    found: dict[str, list[float]] = {}
    first: dict[str, float | None] = {}
    peaks: dict[str, int] = {}
    refused: dict[str, str] = {}
    for name, call in ways.items():
        try:
            first[name] = call()
            call()
            found[name] = []
        except Exception as error:  # out of memory, no kernel for it: that is a result, too
            refused[name] = reason(error)
            print(f"{name} did not run: {refused[name]}", flush=True)
            free()
    for _ in range(size.calls):
        for name in found:
            synchronise(size)
            if size.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if size.device == "cuda" else 0
            start = time.perf_counter()
            ways[name]()
            synchronise(size)
            found[name].append(time.perf_counter() - start)
            if size.device == "cuda":
                peaks[name] = max(peaks.get(name, 0), torch.cuda.max_memory_allocated() - before)
    figures = {
        name: {"seconds": quartiles(seconds), "peak_bytes": peaks.get(name)}
        | ({} if first[name] is None else {"loss": first[name]})
        for name, seconds in found.items()
    }
    return figures, refused


def reason(error: Exception) -> str:
    """The first words of an error, without the places of files that libraries put in brackets."""
    text = re.sub(r" \(/[^)]*\)", "", str(error).splitlines()[0])
    return textwrap.shorten(f"{type(error).__name__}: {text}", 100, placeholder=" ...")


def require_equal_losses(found: Mapping[str, Mapping[str, Any]]) -> None:
    """The first call's loss of every way.

    Raises:
        Refused: they differ by more than rounding: what was timed would not be the same work.
    """
    require_close({name: figures["loss"] for name, figures in found.items()}, relative=LOSSES_DIFFER)


def synchronise(size: Size) -> None:
    if size.device == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def faster(says: str, found: Mapping[str, Any], ours: str, theirs: str) -> list[dict[str, Any]]:
    """The claim that ours has the higher rate; none where one of the two did not run."""
    if ours not in found or theirs not in found:
        return []
    rate = found[theirs]["seconds"]["median"] / found[ours]["seconds"]["median"]
    return [claims.claim(says, rate, above=1.0)]


def describe(size: Size) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if size.device == "cuda" else None
    described = machine.describe()
    versions = {name: importlib.metadata.version(name) for name in KERNELS if importlib.util.find_spec(KERNELS[name])}
    described["libraries"] |= versions
    return {**described, "gpu": gpu, "torch_cuda": torch.version.cuda}


# ---- attention


def attention_part(size: Size) -> dict[str, Any]:
    """Forward and backward of one layer's attention by every backend, on batches that recipes make."""
    torch.manual_seed(0)
    lengths = mixed_lengths(size.tokens, size.long)
    group = size.long // 8
    prompts = size.tokens // (group + 8 * (group // 2))
    batches = {
        "one document": Segments([size.tokens], [-1]),
        "full rows": Segments([size.long] * size.documents, [-1] * size.documents),
        "mixed documents": Segments(lengths, [-1] * len(lengths)),
        "prompts with 8 responses": Segments(
            [group, *[group // 2] * 8] * prompts, [x for p in range(prompts) for x in (-1, *[9 * p] * 8)]
        ),
    }
    options = {"": {}, ", window": {"window": size.long // 2}, ", soft-cap": {"softcap": 50.0}}
    results = {}
    for name, segments in batches.items():
        for suffix, given in options.items():
            if suffix and name != "full rows":
                continue
            results[name + suffix] = attention_of(segments, given, size)
    return {"machine": describe(size), "claims": [], "heads": size.heads, "tokens": size.tokens, "batches": results}


def attention_of(segments: Segments, options: dict[str, Any], size: Size) -> dict[str, Any]:
    heads, key_heads, width = size.heads
    tokens = int(segments.lengths.sum())
    inputs = [
        torch.randn(tokens, count, width, device=size.device, dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    ]
    upstream = torch.randn(tokens, heads, width, device=size.device, dtype=torch.bfloat16)
    request = Request.of(*inputs, options.get("window"), options.get("softcap"))
    refused = {name: reason for name, backend in BACKENDS.items() if (reason := backend.refuses(request))}

    def way(backend: str) -> Call:
        def call() -> None:
            out = attention(*inputs, segments, backend=backend, **options)
            torch.autograd.grad(out, inputs, upstream)

        return call

    found, failed = in_turns({name: way(name) for name in BACKENDS if name not in refused}, size)
    pairs = sum(
        attended_pairs(int(length), int(before), options.get("window"))
        for length, before in zip(segments.lengths, segments.prefix_lengths, strict=True)
    )
    flops = 3.5 * 4 * heads * width * pairs  # backwards the scores are computed again: five products after two
    for figures in found.values():
        figures["tflops"] = flops / figures["seconds"]["median"] / 1e12
    return {"found": found, "refused": refused | failed}


def mixed_lengths(tokens: int, longest: int) -> list[int]:
    """Uniform in their logarithm between a sixteenth of the longest and it, `tokens` together."""
    draw = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(int(longest * 16 ** -draw.random()))
    lengths[-1] -= sum(lengths) - tokens
    return [length for length in lengths if length > 1]


# ---- training


def model_config(size: Size) -> ModelConfig:
    from lightning_llm.pipeline.composition import CONF

    values = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{size.model}.yaml"))
    config = ModelConfig(**{key: value for key, value in values.items() if key != "defaults"})  # pyright: ignore
    return replace(config, **size.shape)


def own_model(config: ModelConfig, size: Size) -> Transformer:
    with torch.device(size.device):
        model = Transformer(config)
    model.reset_parameters(0)
    return model


def their_model(model: Transformer, folder: str) -> nn.Module:
    """transformers' class with the same weights."""
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    model.save_pretrained(Path(folder))
    device = model.embed_tokens.weight.device
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)


def training_part(size: Size) -> dict[str, Any]:
    """A whole step of causal language modelling: weights and optimizer in fp32, products in bf16."""
    import tempfile

    config = model_config(size)
    rows = np.random.default_rng(0).integers(0, config.vocab_size, (size.documents, size.long))
    mixed = mixed_lengths(size.tokens, size.long)
    documents = {
        "full rows": list(rows),
        "mixed documents": [rows.reshape(-1)[:length] for length in mixed],
    }
    results, judged = {}, []
    for name, texts in documents.items():
        free()
        ours = own_model(config, size)
        with tempfile.TemporaryDirectory() as folder:
            theirs = their_model(ours, folder)
        compiled = copy.deepcopy(ours)
        compile_parts(compiled)
        ways: dict[str, Call] = {}
        batch = SegmentBatch.from_documents(texts)
        own_step = step_of_ours(ours, CausalLMConfig(), batch, size)
        for backend in BACKENDS:
            request = Request(
                size.device, torch.bfloat16, config.head_size, capability=capability(torch.device(size.device))
            )
            if BACKENDS[backend].refuses(request) is None:
                ways[f"ours, {backend}"] = own_step(backend)
        ways["ours, compiled"] = step_of_ours(compiled, CausalLMConfig(), batch, size)("auto")
        ways["transformers"] = step_of_theirs(theirs, texts, size)
        found, refused = in_turns(ways, size)
        require_equal_losses(found)
        tokens = sum(map(len, texts))
        flops = training_flops(config, [(len(text), 0) for text in texts])
        for figures in found.values():
            seconds = figures["seconds"]["median"]
            figures["tokens_per_second"] = tokens / seconds
            if size.flops_per_second:
                figures["flops_utilisation"] = flops / seconds / size.flops_per_second
        best = min((way for way in found if way.startswith("ours")), key=lambda way: found[way]["seconds"]["median"])
        judged += faster(f"Training, {name}: times the rate of transformers ({best})", found, best, "transformers")
        results[name] = {"found": found, "refused": refused, "tokens": tokens}
        del ours, theirs, compiled, ways, own_step
    return {"machine": describe(size), "claims": judged, "model": size.model, "batches": results}


@contextmanager
def mixed_precision(size: Size) -> Iterator[None]:
    """As Lightning's bf16-mixed."""
    with torch.autocast(size.device, torch.bfloat16):
        yield


def step_of_ours(
    model: Transformer, config: ObjectiveConfig, batch: SegmentBatch, size: Size, **others: Transformer
) -> Callable[[str], Call]:
    objective = config.build(model, **others).to(size.device)  # which moves what it asks there
    optimizer = OPTIMIZER.build(model)

    def with_backend(backend: str) -> Call:
        def call() -> float:
            model.attention_backend = backend
            with mixed_precision(size):
                totals = optimizer_step(
                    lambda micro: objective.loss(micro.to(size.device)),
                    [batch],
                    optimizer,
                    units=sum(batch.target_counts),
                    learning_rate=LEARNING_RATE,
                    clip_norm=OPTIMIZER.clip_norm,
                )
            return totals.means()["loss"]

        return call

    return with_backend


def step_of_theirs(model: nn.Module, texts: list[np.ndarray], size: Size) -> Call:
    """Documents of unlike length are padded on the right, and as many rows go together as full rows would."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    parts = [texts[first : first + size.documents] for first in range(0, len(texts), size.documents)]
    targets = sum(len(text) - 1 for text in texts)

    def padded(part: list[np.ndarray]) -> dict[str, Tensor]:
        longest = max(map(len, part))
        ids = torch.tensor(np.stack([np.pad(text, (0, longest - len(text))) for text in part]))
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in part])
        given = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, IGNORED)}
        return given if mask.all() else {**given, "attention_mask": mask}

    batches = [padded(part) for part in parts]

    def call() -> float:
        total = 0.0
        for part, given in zip(parts, batches, strict=True):
            share = sum(len(text) - 1 for text in part) / targets
            with mixed_precision(size):
                loss = model(**{name: values.to(size.device) for name, values in given.items()}, use_cache=False).loss
            (loss * share).backward()
            total += loss.detach() * share
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return call


# ---- distillation


def distillation_part(size: Size) -> dict[str, Any]:
    """A step where a teacher has a say beside the same step without one: from kept ids, and from the teacher itself.

    The teacher that is asked is of the student's size; what is kept is drawn, since no time depends on it.
    """
    config = model_config(size)
    draw = np.random.default_rng(0)
    rows = list(draw.integers(0, config.vocab_size, (size.documents, size.long)))

    def with_kept(k: int) -> SegmentBatch:
        ids = draw.integers(0, config.vocab_size, (size.documents, size.long, k), dtype=np.int32)
        log_p = torch.randn(size.documents, size.long, k + 2).log_softmax(-1).half().numpy()
        return SegmentBatch.from_segments(rows, token_columns={IDS: list(ids), LOG_P: list(log_p)})

    free()
    student, teacher = own_model(config, size), own_model(config, size)
    plain = step_of_ours(student, CausalLMConfig(), SegmentBatch.from_documents(rows), size)
    ways = {"plain": plain("auto")}
    for k in KEPT:
        kept = DistillationConfig(targets="top_k" if k > 1 else "top1", k=k)
        ways[f"{k} kept" if k > 1 else "top-1 kept"] = step_of_ours(student, kept, with_kept(k), size)("auto")
    asked = DistillationConfig(targets="full", teacher_weight=1.0)
    ways["teacher asked"] = step_of_ours(
        student, asked, SegmentBatch.from_documents(rows), size, teacher=teacher.to(torch.bfloat16)
    )("auto")
    found, refused = in_turns(ways, size)
    for figures in found.values():
        figures["tokens_per_second"] = size.tokens / figures["seconds"]["median"]
    judged = []
    if (most := f"{KEPT[-1]} kept") in found:
        cost = found[most]["seconds"]["median"] / found["plain"]["seconds"]["median"]
        judged = [
            claims.claim(f"Time of a step from {KEPT[-1]} kept ids over that of plain training", cost, at_most=1.15)
        ]
    return {"machine": describe(size), "claims": judged, "model": size.model, "found": found, "refused": refused}


# ---- the vocabulary


def vocabulary_part(size: Size) -> dict[str, Any]:
    """The loss of the vocabulary and its gradients, from hidden states in bf16 and a head in fp32.

    torch's linear cross-entropy (2.13 and later) and Liger's get the head in bf16, as autocast would make it.
    """
    count, width, vocabulary = size.hidden
    torch.manual_seed(0)
    hidden = torch.randn(count, width, device=size.device, dtype=torch.bfloat16, requires_grad=True)
    weight = nn.Parameter(torch.randn(vocabulary, width, device=size.device) / width**0.5)
    targets = torch.randint(vocabulary, (count,), device=size.device)

    def way(loss: Callable[[], Tensor]) -> Call:
        def call() -> float:
            with mixed_precision(size):
                total = loss()
            torch.autograd.grad(total, (hidden, weight))
            return total.item()

        return call

    def torch_fused() -> Tensor:
        from torch.nn.functional import linear_cross_entropy

        options = torch.nn.LinearCrossEntropyOptions()  # without them it is the dense one
        return linear_cross_entropy(hidden, weight.to(hidden.dtype), targets, options=options)

    def liger() -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(weight.to(hidden.dtype), hidden, targets)

    ones = torch.ones(count, device=size.device)
    ways = {
        "ours": way(lambda: -token_log_likelihood(hidden, weight, targets, token_weights=ones).mean()),
        "ours_in_backward": way(lambda: -token_log_likelihood(hidden, weight, targets).mean()),
        "dense": way(lambda: nn.functional.cross_entropy(nn.functional.linear(hidden, weight).float(), targets)),
        "torch_fused": way(torch_fused),
        "liger": way(liger),
    }
    found, refused = in_turns(ways, size)
    require_equal_losses(found)
    judged = faster("Vocabulary: times the speed of dense logits", found, "ours", "dense")
    if found["ours"]["peak_bytes"]:
        share = found["ours"]["peak_bytes"] / found["dense"]["peak_bytes"]
        judged.append(claims.claim("Vocabulary: share of the memory of dense logits", share, below=1.0))
    return {"machine": describe(size), "claims": judged, "shape": size.hidden, "found": found, "refused": refused}


# ---- generation


def generation_part(size: Size) -> dict[str, Any]:
    """Sampling at temperature 1 from weights in bf16."""
    import tempfile

    config = model_config(size)
    model = own_model(config, size).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs = their_model(model, folder).to(torch.bfloat16).eval()
    model.to(torch.bfloat16)
    theirs.generation_config.eos_token_id = None  # pyright: ignore
    count, length, new = size.prompts
    draw = np.random.default_rng(0)
    prompts = draw.integers(0, config.vocab_size, (count, length)).tolist()

    def ours(prompts: list[list[int]], samples: int, is_recorded: bool = True) -> Call:
        def call() -> None:
            with nullcontext() if is_recorded else mock.patch.object(engine, "can_be_recorded", return_value=False):
                found = sample(
                    model, prompts, samples=samples, max_new_tokens=new, stop_ids=(), sampling=Sampling(1.0),
                    batch_size=count,
                )  # fmt: skip
            assert sum(len(response.ids) for response in found) == count * new

        return call

    def of_transformers(prompts: list[list[int]], samples: int) -> Call:
        ids = torch.tensor(prompts, device=size.device)

        def call() -> None:
            out = theirs.generate(  # pyright: ignore
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, num_return_sequences=samples, pad_token_id=0,
            )  # fmt: skip
            assert out.shape == (count, length + new)

        return call

    results, judged = {}, []
    for name, some, samples in (
        ("a sample a prompt", prompts, 1),
        ("8 samples a prompt", prompts[: count // 8] or prompts[:1], 8),
    ):
        if len(some) * samples != count:
            continue
        found, refused = in_turns(
            {
                "ours": ours(some, samples),
                "ours_kernel_by_kernel": ours(some, samples, is_recorded=False),
                "transformers": of_transformers(some, samples),
            },
            replace(size, calls=max(2, size.calls // 3)),
        )
        for figures in found.values():
            figures["tokens_per_second"] = count * new / figures["seconds"]["median"]
        results[name] = {"found": found, "refused": refused}
        judged += faster(f"Sampling, {name}: times the rate of transformers", found, "ours", "transformers")
    return {
        "machine": describe(size),
        "claims": judged,
        "model": size.model,
        "prompts": size.prompts,
        "batches": results,
    }


PARTS = {
    "attention": attention_part,
    "training": training_part,
    "distillation": distillation_part,
    "vocabulary": vocabulary_part,
    "generation": generation_part,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--small", action="store_true", help="try the script on any device; writes nothing")
    asked = parser.parse_args()
    if not asked.small and not torch.cuda.is_available():
        parser.error("torch finds no NVIDIA GPU here; --small tries the script without one")
    verdicts = []
    for name in asked.parts or PARTS:
        free()
        found = PARTS[name](SMALL if asked.small else LARGE)
        if asked.small:
            print(name, found)
        else:
            verdicts.append(claims.write_part("gpu", name, found))
    claims.finish(verdicts)


if __name__ == "__main__":
    main()
