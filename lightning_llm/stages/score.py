"""The verb score: what a frozen model says of every target token of prepared data.

For a reference, of all rows: `<source>/<split>/logps.bin`, float32 nats, one for each token of the same source and
split's tokens.bin, 0 where nothing counts. For a teacher, of the rows that a stage consumes: what it expects in the
place of each token (`data/teacher.py`). `StageData` makes columns of either. Batches follow one another in an order
that depends on nothing else, so what an interrupted run has written is continued (`scored.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.packing import Feed, StageData, iterate_batches
from lightning_llm.data.teacher import IDS, LOG_P, TeacherFormat
from lightning_llm.data.token_store import TokenStore
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.losses.distillation import to_stored
from lightning_llm.models import Transformer
from lightning_llm.models.kernels import use_attention
from lightning_llm.models.size import forward_flops
from lightning_llm.objectives.base import token_logps
from lightning_llm.stages.config import ScoreSettings, TeacherSettings
from lightning_llm.stages.context import StageContext, StageResult, model_directory, refuse_other_tokenizer, threads
from lightning_llm.stages.scored import Scored

Columns = dict[str, tuple[np.dtype, int]]  # name of a file -> type, and numbers of each token
Answer = tuple[dict[str, Tensor], dict[str, float]]  # by file, rows of the targets that count; sums of what is logged
Ask = Callable[[SegmentBatch, Tensor], Answer]  # of a batch and the numbers of its targets that count


@dataclass(frozen=True)
class Part:
    """Rows of one source and split, and the files of what is said of them."""

    source: str
    folder: Path
    feed: Feed
    units: (
        np.ndarray | None
    )  # of the feed; None: all, and each token has the place in the files that it has in the store
    tokens: int  # that the files have room for


def run(context: StageContext) -> StageResult:
    """Score on one device.

    Raises:
        UserError: the model has another tokenizer than the data.
    """
    refuse_other_tokenizer(f"stage {context.name}", context.inputs)
    with torch.no_grad(), threads(context.compute.threads):
        return score(context)


def score(context: StageContext) -> StageResult:
    """The body of the stage: what is known of the targets, by the places of their tokens."""
    settings: ScoreSettings = context.settings
    device = torch.device("cuda" if context.compute.accelerator == "gpu" else "cpu")
    model = Transformer.from_pretrained(model_directory(context.inputs["model"])).eval().to(device)
    use_attention(model, context.compute, precision=settings.precision, needs_gradient=False)
    if isinstance(settings, TeacherSettings):
        (columns, ask), parts = of_teacher(context, model), list(consumed_parts(context))
    else:
        (columns, ask), parts = of_reference(model), list(all_parts(context))
    scored = Scored.read(context.output, context.compute.micro_batch_tokens)
    total = sum(part.tokens for part in parts)
    if scored.tokens:
        context.console.note(f"{scored.tokens:,} of {total:,} tokens were scored before")
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        for part in parts[scored.part :]:
            score_part(context, model, part, open_files(part, columns, goes_on=scored.batches > 0), ask, scored, total)
    Scored.forget(context.output)
    ledger: dict[str, int] = {}
    for part in parts:
        ledger[part.source] = ledger.get(part.source, 0) + part.tokens
    rates = {
        "tokens_per_second": scored.tokens / scored.seconds if scored.seconds else 0.0,
        "bytes_per_token": sum(dtype.itemsize * width for dtype, width in columns.values()),
    }
    means = {name: value / max(scored.targets, 1) for name, value in scored.sums.items()}
    return StageResult({"tokens": scored.tokens, "targets": scored.targets, **means, **rates}, ledger, scored.flops)


def score_part(
    context: StageContext,
    model: Transformer,
    part: Part,
    files: dict[str, np.ndarray],
    ask: Ask,
    scored: Scored,
    total: int,
) -> None:
    """The batches of a part from where scoring is, into its files.

    Args:
        scored: is brought to the beginning of the next part.
        total: tokens of all parts.
    """
    settings: ScoreSettings = context.settings
    device = model.head_weight.device
    batches = iterate_batches(part.feed, settings.context, context.compute.micro_batch_tokens, part.units)
    for batch, origins in itertools.islice(batches, scored.batches, None):
        counted = batch.target_mask.nonzero().squeeze(1)
        answers, found = ask(batch.to(device), counted.to(device))
        places = batch.target_positions[counted].numpy()
        places = origins[places] if part.units is None else scored.place + places
        for name, values in answers.items():
            files[name][places] = values.cpu().numpy().reshape(len(places), -1)
        scored.add(batch.num_tokens, len(counted), forward_flops(model.config, batch.extents), found)
        scored.record(context.output, files.values())
        context.console.update(scored.tokens, total, "tok")
    for file in files.values():
        if isinstance(file, np.memmap):
            file.flush()
    scored.end_part()


def open_files(part: Part, columns: Columns, *, goes_on: bool) -> dict[str, np.ndarray]:
    """Files of zeros, [tokens, numbers of each] by name, written where they are touched.

    Args:
        goes_on: they are there, with what an interrupted run has written.
    """
    part.folder.mkdir(parents=True, exist_ok=True)
    if part.units is not None:
        np.save(part.folder / "spans.npy", spans_of(part.feed, part.units))
    files = {}
    for name, (dtype, width) in columns.items():
        path = part.folder / f"{name}.bin"
        if part.tokens:
            files[name] = np.memmap(path, dtype, "r+" if goes_on else "w+", shape=(part.tokens, width))
        else:
            path.touch()
            files[name] = np.empty((0, width), dtype)
    return files


def spans_of(feed: Feed, units: np.ndarray) -> np.ndarray:
    """Where each of the units begins in tokens.bin, and where if nothing lies between them; last, where these end."""
    lengths = feed.lengths[units]
    begins = np.array([feed.begin(unit) for unit in units.tolist()], np.int64)
    end = begins[-1:] + lengths[-1:] if len(units) else np.zeros(1, np.int64)
    offsets = np.concatenate(([0], lengths.cumsum())).astype(np.int64)
    return np.stack((np.concatenate((begins, end)), offsets), axis=1)


# ---- for a reference ----


def all_parts(context: StageContext) -> Iterator[Part]:
    """Every source and split of the data, whole."""
    settings: ScoreSettings = context.settings
    for folder in sorted((context.inputs["data"] / "sources").iterdir()):
        for split in settings.split:
            store = TokenStore.open(folder / split)
            feed = Feed(folder.name, store, settings.context, settings.on_long, {})
            yield Part(folder.name, context.output / folder.name / split, feed, None, store.tokens)


def of_reference(model: Transformer) -> tuple[Columns, Ask]:
    """The log-probability of each token."""

    def ask(batch: SegmentBatch, counted: Tensor) -> Answer:
        logps = token_logps(model, batch)[counted].float()
        return {"logps": logps}, {"logps/mean": float(logps.double().sum())}

    return {"logps": (np.dtype(np.float32), 1)}, ask


# ---- for a student ----


def consumed_parts(context: StageContext) -> Iterator[Part]:
    """What the stage that learns will see of each source, one unit after the other."""
    settings: TeacherSettings = context.settings
    data = StageData(
        context.inputs["data"],
        settings.data,
        context_ramp=[{"at": place, "value": value} for place, value in enumerate(settings.contexts)],
        batch_ramp=settings.tokens,  # how they are spread over steps does not matter
        total_tokens=settings.tokens,
        seed=settings.seed,
    )
    for number, feed in enumerate(data.feeds):
        units = data.units(number)
        yield Part(feed.name, context.output / feed.name, feed, units, int(feed.lengths[units].sum()))


def of_teacher(context: StageContext, model: Transformer) -> tuple[Columns, Ask]:
    """The ids that the model finds likeliest in each token's place, with the parts that their probabilities leave."""
    settings: TeacherSettings = context.settings
    entries = Tokenizer.load(context.inputs["tokenizer"] / "tokenizer").vocab_size
    kept = TeacherFormat.of(min(settings.k, entries - 2), settings.stored_as, entries)  # beside the label one is left
    kept.write(context.output)
    dtype = getattr(torch, kept.ids)

    def ask(batch: SegmentBatch, counted: Tensor) -> Answer:
        labels = batch.target_ids[counted]
        hidden = model(batch)[batch.predictors[counted]]
        ids, log_p = model.top_log_probabilities(hidden, labels, kept.k, settings.temperature, entries)
        found = {
            "teacher/favours_label": float((ids[:, 0] == labels).sum()),
            "teacher/kept_mass": float(log_p[:, : kept.k].exp().sum(dtype=torch.float64)),
        }
        answers = {IDS: ids.to(dtype)}
        return answers if kept.log_p is None else answers | {LOG_P: to_stored(log_p, kept.log_p)}, found

    return kept.columns, ask
