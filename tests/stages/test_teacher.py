"""A teacher's expectations as an artifact, and students that learn from them, kept or asked live."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_llm.batch import SegmentBatch
from lightning_llm.data.packing import StageData
from lightning_llm.data.teacher import TeacherFormat
from lightning_llm.data.token_store import TokenStore
from lightning_llm.data.tokenizer import Tokenizer
from lightning_llm.losses.distillation import from_stored
from lightning_llm.models import Transformer
from lightning_llm.models.size import forward_flops, training_flops
from lightning_llm.objectives.config import DistillationConfig
from lightning_llm.settings import UserError
from lightning_llm.stages import score, train
from lightning_llm.stages.config import ComputeConfig, TeacherSettings


@pytest.fixture(scope="module")
def teacher(settings, prepared, tokenizer_artifact, context_of):
    """A wider and deeper model that has learnt to count: (artifact, model)."""
    shape = replace(settings().model, hidden_size=48, num_hidden_layers=3, intermediate_size=96)
    context = context_of(
        settings(model=shape, tokens=60_000), {"tokenizer": tokenizer_artifact, "data": prepared["text"]}
    )
    train.run(context)
    return context.output, Transformer.from_pretrained(context.output / "model")


@pytest.fixture(scope="module")
def taught(teacher, prepared, tokenizer_artifact, data_config, context_of):
    """`taught(k, stored_as)` -> (artifact, result), for the student that `settings` describes."""

    def make(k=4, stored_as="float16", contexts=(64,), micro_batch_tokens=256, form="text", tokens=12_000, seed=3):
        inputs = {"model": teacher[0], "data": prepared[form], "tokenizer": tokenizer_artifact}
        consumed = {"data": data_config(form), "contexts": list(contexts), "tokens": tokens, "seed": seed}
        asked = TeacherSettings(max(contexts), ["train"], "fp32", k=k, stored_as=stored_as, **consumed)
        stage = context_of(asked, inputs, compute=ComputeConfig(micro_batch_tokens=micro_batch_tokens))
        return stage.output, score.run(stage)

    return make


def expected(model, ids, entries):
    """Log-probabilities [n - 1, V] of the tokens after the first, from all logits at once, without padding rows."""
    with torch.no_grad():
        logits = model.logits(model(SegmentBatch.from_documents([ids])))[:-1, :entries]
    return logits.log_softmax(-1)


@pytest.mark.parametrize(("stored_as", "precision"), [("float16", 5e-3), ("uint8", 1 / 32 + 1e-4)])
def test_what_stands_in_a_tokens_place_is_what_the_teacher_expects_there(
    stored_as, precision, teacher, taught, prepared, tokenizer_artifact
):
    folder, result = taught(4, stored_as, tokens=60_000)  # all there is, and more
    entries = Tokenizer.load(tokenizer_artifact / "tokenizer").vocab_size
    store = TokenStore.open(prepared["text"] / "sources" / "prose" / "train")
    columns = TeacherFormat.read(folder).open(folder / "prose")
    row = int(np.argmax(store.row_lengths))
    ids, place = store.row(row).segments[0], store.token_slice(row)
    assert len(ids) > 64
    for begin, end in ((0, 64), (64, len(ids))):  # pieces of the context, whose first token nothing predicts
        piece = slice(place.start + begin, place.start + end)
        got_ids = columns["teacher_ids"][piece][1:].astype(np.int64)
        got = from_stored(torch.from_numpy(columns["teacher_logps"][piece][1:].copy()))
        assert not columns["teacher_ids"][piece][0].any()
        log_p = expected(teacher[1], ids[begin:end], entries)
        values = log_p.topk(4).values
        torch.testing.assert_close(log_p.gather(1, torch.from_numpy(got_ids)), values, rtol=0, atol=1e-4)
        sure = values > -15
        torch.testing.assert_close(got[:, :4][sure], values[sure], rtol=1e-3, atol=precision)
    assert result.metrics["bytes_per_token"] == 4 * 2 + 6 * (2 if stored_as == "float16" else 1)
    size = sum(path.stat().st_size for path in folder.glob("*/*.bin"))
    tokens = sum(TokenStore.open(p / "train").tokens for p in (prepared["text"] / "sources").iterdir())
    assert size == tokens * result.metrics["bytes_per_token"]
    assert 0.5 < result.metrics["teacher/kept_mass"] <= 1
    assert result.metrics["tokens_per_second"] > 0


def test_the_teachers_packing_does_not_matter(taught):
    one, many = taught(micro_batch_tokens=1)[0], taught(micro_batch_tokens=4096)[0]
    read = [np.fromfile(folder / "prose" / "teacher_logps.bin", np.float16) for folder in (one, many)]
    sure = read[0].astype(np.float32) > -12
    np.testing.assert_allclose(read[0][sure].astype(np.float32), read[1][sure].astype(np.float32), atol=2e-2)


def test_of_a_favourite_two_bytes_are_kept(taught):
    folder, result = taught(1, None)
    assert result.metrics["bytes_per_token"] == 2
    assert {path.name for path in (folder / "prose").iterdir()} == {"teacher_ids.bin", "spans.npy"}


def test_only_what_the_student_consumes_is_asked(taught, prepared, data_config):
    folder, result = taught(2, tokens=2000)
    assert 2000 <= result.metrics["tokens"] < 2000 + 2 * 65  # to the end of each source's last unit
    assert result.ledger["prose"] == pytest.approx(1400, abs=65)
    options = {"context_ramp": 64, "total_tokens": 2000, "teacher": folder}
    for batch_ramp in (100, 700):  # of any size
        data = StageData(prepared["text"], data_config("text"), **options, batch_ramp=batch_ramp, seed=3)
        windows = [data.window(step, micro_batch_tokens=128) for step in range(data.steps)]
        assert all("teacher_ids" in batch.columns for window in windows for batch in window.mine)
    other = StageData(prepared["text"], data_config("text"), **options, batch_ramp=700, seed=4)
    with pytest.raises(UserError, match="says nothing of the tokens"):
        [other.window(step, micro_batch_tokens=128) for step in range(other.steps)]


def test_rows_are_found_by_their_tokens_whatever_the_packing(teacher, taught, prepared, data_config):
    """Windows of a ramp of contexts, shuffled and mixed, carry what the teacher expects in each target's place."""
    folder, _ = taught(4, contexts=(32, 64), tokens=6000)
    ramps = {"context_ramp": [{"at": 0, "value": 32}, {"at": 3000, "value": 64}], "batch_ramp": 500}
    data = StageData(prepared["text"], data_config("text"), **ramps, total_tokens=6000, seed=3, teacher=folder)
    for step in (0, 11):
        for batch in data.window(step, micro_batch_tokens=200).mine:
            assert batch.columns["teacher_ids"].shape == (len(batch.target_ids), 4)
            assert batch.columns["teacher_logps"].dtype == torch.float16
            if data.context(step) < 64:  # the teacher has seen more
                continue
            hidden = teacher[1](batch)[batch.predictors]
            ids, _ = teacher[1].top_log_probabilities(hidden, batch.target_ids, 1)
            assert (ids[:, 0] == batch.columns["teacher_ids"][:, 0].long()).float().mean() > 0.99
    (_, held_out), *_ = data.validation(64, 500)
    assert not held_out.columns


def test_a_rank_without_a_share_has_columns_too(taught, prepared, data_config):
    data = StageData(
        prepared["text"], data_config("text"), context_ramp=64, batch_ramp=70, total_tokens=700, seed=3,
        teacher=taught(4)[0],
    )  # fmt: skip
    windows = [data.window(0, rank=rank, world_size=8, micro_batch_tokens=70) for rank in range(8)]
    fillers = [batch for window in windows for batch in window.mine if not any(batch.target_counts)]
    assert fillers
    assert all(batch.columns["teacher_ids"].shape == (1, 4) for batch in fillers)


def test_a_file_that_was_cut_is_refused(taught, prepared, data_config):
    folder, _ = taught(2)
    file = folder / "prose" / "teacher_ids.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match="does not hold 2 numbers for each"):
        StageData(
            prepared["text"], data_config("text"), context_ramp=64, batch_ramp=70, total_tokens=700, seed=3,
            teacher=folder,
        )  # fmt: skip


# ---- students ----


def student(objective, settings, prepared, tokenizer_artifact, context_of, *, form="text", **inputs):
    context = context_of(
        settings(form, objective=objective, context=[{"at": 0, "value": 64}]),
        {"tokenizer": tokenizer_artifact, "data": prepared[form], **inputs},
    )
    return context, train.run(context)


def lines(context):
    return [json.loads(line) for line in (context.output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("targets", ["top1", "top_k", "full"])
def test_a_student_comes_nearer_to_its_teacher(
    targets, teacher, taught, settings, prepared, tokenizer_artifact, context_of
):
    objective = DistillationConfig(targets=targets, teacher_weight=1.0, k=4)
    kept = {"teacher": taught(1 if targets == "top1" else 4, None if targets == "top1" else "uint8")[0]}
    inputs = {"teacher_model": teacher[0]} if targets == "full" else kept
    context, result = student(objective, settings, prepared, tokenizer_artifact, context_of, **inputs)
    training = [line for line in lines(context) if "loss" in line]
    validation = [line["validation/loss"] for line in lines(context) if "validation/loss" in line]
    assert validation[-1] < 0.7 * validation[0]  # of true labels, which it has not seen
    name = {"top1": "teacher/favours_label", "top_k": "kl/teacher", "full": "kl/teacher"}[targets]
    if name == "kl/teacher":
        assert training[-1][name] < 0.5 * training[0][name]
    own = training_flops(Transformer.from_pretrained(context.output / "model").config, [(64, 0)])
    asked = forward_flops(teacher[1].config, [(64, 0)]) if targets == "full" else 0.0
    ratio = result.flops / (result.metrics["tokens"] / 64 * own)
    assert ratio == pytest.approx(1 + asked / own, rel=0.1)  # pieces are shorter than 64
    assert Transformer.from_pretrained(context.output / "model").config.hidden_size == 32


def test_kept_whole_and_asked_live_make_the_same_student(
    teacher, taught, settings, prepared, tokenizer_artifact, context_of
):
    entries = Tokenizer.load(tokenizer_artifact / "tokenizer").vocab_size
    model = replace(settings().model, vocab_size=entries)
    losses = []
    for targets, inputs in (
        ("full", {"teacher_model": teacher[0]}),
        ("top_k", {"teacher": taught(entries, "float16")[0]}),  # all of them but two
    ):
        objective = DistillationConfig(targets=targets, teacher_weight=0.5, k=entries)
        named = {"model": model, "tokens": 3000, "context": [{"at": 0, "value": 64}]}
        context = context_of(
            settings(objective=objective, **named),
            {"tokenizer": tokenizer_artifact, "data": prepared["text"], **inputs},
        )
        losses.append(train.run(context).metrics["validation/loss"])
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


def test_conversations_are_taught_where_the_assistant_speaks(
    taught, settings, prepared, tokenizer_artifact, context_of
):
    objective = DistillationConfig(targets="top_k", k=4)
    inputs = {"teacher": taught(4, "float16", form="conversations")[0]}
    _, result = student(objective, settings, prepared, tokenizer_artifact, context_of, form="conversations", **inputs)
    assert result.metrics["loss"] > 0


def test_a_teacher_of_another_tokenizer_is_refused(
    teacher, settings, prepared, tokenizer_artifact, context_of, tmp_path
):
    teacher[1].save_pretrained(tmp_path)
    own = Tokenizer.load(tokenizer_artifact / "tokenizer")
    Tokenizer(own.backend, own.chat_template + "\n", own.settings).save(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer of the data \(sha .*\) is not that of the model"):
        student(
            DistillationConfig(targets="full"), settings, prepared, tokenizer_artifact, context_of,
            teacher_model=tmp_path,
        )  # fmt: skip
    asked = TeacherSettings(64, ["train"], "fp32")
    inputs = {"model": tmp_path, "data": prepared["text"], "tokenizer": tokenizer_artifact}
    with pytest.raises(UserError, match="is not that of the model"):
        score.run(context_of(asked, inputs))
