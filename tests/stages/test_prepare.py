"""From sources to token stores: what is learnt, what is held out, what is skipped, and who is told."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from lightning_llm.data.config import DataConfig, SourceConfig, TokenizerConfig
from lightning_llm.data.packing import StageData
from lightning_llm.data.token_store import TokenStore
from lightning_llm.data.tokenizer import Tokenizer, train_tokenizer
from lightning_llm.settings import UserError
from lightning_llm.stages.config import ComputeConfig, PrepareSettings, TokenizerSettings
from lightning_llm.stages.context import StageContext
from lightning_llm.stages.prepare import run
from lightning_llm.training.console import Console

TASKS = SourceConfig("embedded:instructions", options={"rows": 60, "held_out": 20})
PAIRS = SourceConfig("embedded:preferences", options={"rows": 40, "held_out": 8})


def stage(output, settings, **inputs):
    """Run the verb in `output`; returns the folder and what the stage says of itself."""
    output.mkdir(parents=True, exist_ok=True)
    console = Console(1, io.StringIO()).stage(1, "test", "prepare")
    return output, run(StageContext("test", settings, inputs, output, ComputeConfig(), console))


@pytest.fixture(scope="module")
def tokenizer_artifact(tmp_path_factory):
    sources = {name: SourceConfig(f"embedded:{name}") for name in ("instructions", "preferences", "web")}
    settings = TokenizerSettings(TokenizerConfig(400, sources, 40_000), "train", 0)
    return stage(tmp_path_factory.mktemp("artifacts") / "tokenizer", settings)[0]


@pytest.fixture
def prepare(tmp_path, tokenizer_artifact):
    def run_(sources, splits=("train", "validation"), contexts=(), tokenizer=tokenizer_artifact, **data):
        config = DataConfig(sources=sources, **data)
        settings = PrepareSettings(config, list(contexts), list(splits), 0)
        folder, result = stage(tmp_path / "prepared", settings, tokenizer=tokenizer)
        return folder, result, json.loads((folder / "prepare.json").read_text())["sources"]

    return run_


def rows_of(folder, name, split="train"):
    return TokenStore.open(folder / "sources" / name / split)


def write_lines(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), "utf-8")
    return SourceConfig(str(path))


def test_a_trained_tokenizer_can_be_given_to_another_recipe(tokenizer_artifact, tmp_path):
    trained = Tokenizer.load(tokenizer_artifact / "tokenizer")
    assert trained.vocab_size == 400
    given = TokenizerSettings(TokenizerConfig(), str(tokenizer_artifact / "tokenizer"), 0)
    copied, _ = stage(tmp_path / "copy", given)
    fingerprint = (copied / "tokenizer_fingerprint").read_text()
    assert fingerprint == Tokenizer.load(copied / "tokenizer").fingerprint == trained.fingerprint


def test_a_tokenizer_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("no/such-model", "not a name"):
        with pytest.raises(UserError, match=r"model\.tokenizer: .* is no directory here"):
            stage(tmp_path, TokenizerSettings(TokenizerConfig(), name, 0))
    with pytest.raises(UserError, match=r"tokenizer\.sources: names no text"):
        stage(tmp_path, TokenizerSettings(TokenizerConfig(), "train", 0))
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size: .*at least 259"):
        stage(tmp_path, TokenizerSettings(TokenizerConfig(10, {"tasks": SourceConfig("embedded:tasks")}), "train", 0))


def test_a_tokenizer_learns_from_renamed_columns_and_from_no_held_out_row(tmp_path):
    rows = [{"body": f"zyzzyva{i} quagga{i} " * 9} for i in range(200)]
    source = replace(write_lines(tmp_path / "mine.jsonl", *rows), columns={"text": "body"})
    settings = TokenizerSettings(TokenizerConfig(300, {"mine": source}), "train", 0, validation=0.5)
    texts = []

    def spy(found, size):
        texts.extend(found)
        return train_tokenizer(found, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_llm.stages.tokenizer.train_tokenizer", spy)
        folder, _ = stage(tmp_path / "one", settings)
    trained = Tokenizer.load(folder / "tokenizer")
    assert len(trained.encode_documents(["zyzzyva"])[0]) < 5  # letters and the end mark: merges were learnt
    assert 60 < len(texts) < 140
    wrong = replace(source, columns={"text": "bdy"})
    with pytest.raises(UserError, match=r'mine\.jsonl:1: no field "bdy"'):
        stage(tmp_path / "two", replace(settings, tokenizer=TokenizerConfig(300, {"mine": wrong})))


def test_documents_end_in_their_end_mark_and_all_of_them_is_learnt(prepare, tokenizer_artifact, tmp_path):
    tokenizer = Tokenizer.load(tokenizer_artifact / "tokenizer")
    texts = [f"text number {i}" for i in range(300)]
    source = write_lines(tmp_path / "texts.jsonl", *({"text": text} for text in texts))
    folder, result, report = prepare({"mine": source}, validation=0.2)
    found = []
    for split in ("train", "validation"):
        store = rows_of(folder, "mine", split)
        documents = [store.row(row).segments[0].tolist() for row in range(store.rows)]
        assert all(ids[-1] == tokenizer.eos_id for ids in documents)
        assert store.targets == store.tokens - store.rows
        assert report["mine"]["splits"][split] == {
            "rows": store.rows,
            "tokens": store.tokens,
            "targets": store.targets,
        }
        found += [tokenizer.decode(ids[:-1]) for ids in documents]
    assert sorted(found) == sorted(texts)
    assert 30 < report["mine"]["splits"]["validation"]["rows"] < 90
    assert result.metrics == {"rows": 300, "tokens": result.ledger["mine"], "skipped": 0}
    assert (folder / "tokenizer_fingerprint").read_text() == tokenizer.fingerprint


def test_conversations_and_replayed_text_make_one_stage(prepare, tokenizer_artifact, tmp_path):
    tokenizer = Tokenizer.load(tokenizer_artifact / "tokenizer")
    text = write_lines(tmp_path / "texts.jsonl", *({"text": f"text {i} " * 20} for i in range(50)))
    folder, _, _ = prepare({"tasks": TASKS, "text": text}, form="conversations", contexts=[256])
    store = rows_of(folder, "tasks")
    learnt = [tokenizer.decode(store.row(row).segments[0][store.row(row).masks[0]]) for row in range(store.rows)]
    assert all(said.startswith(("answer: ", "working: ")) and said.endswith("<|im_end|>") for said in learnt)
    assert any(said.count("<|im_end|>") == 2 for said in learnt)  # two turns, masked apart
    assert not any("user" in said for said in learnt)
    config = DataConfig(form="conversations", sources={"tasks": TASKS, "text": text})
    options = {"context_ramp": 256, "batch_ramp": 512, "total_tokens": 2048, "seed": 0}
    window = StageData(folder, config, **options).window(0, micro_batch_tokens=1024)
    assert all(tokens > 200 for tokens in window.consumed.values())


def test_pairs_are_prompt_chosen_rejected_and_responses_are_learnt(prepare, tokenizer_artifact):
    tokenizer = Tokenizer.load(tokenizer_artifact / "tokenizer")
    folder, _, report = prepare({"p": PAIRS}, form="pairs", contexts=[30, 34])
    store = rows_of(folder, "p", "validation")
    for row, content in enumerate(store.metadata()):
        (prompt, chosen, rejected), masks = store.row(row)
        assert tokenizer.decode(prompt) == tokenizer.render_text(content["prompt"], add_generation_prompt=True)
        assert tokenizer.decode(chosen) == content["chosen"] + "<|im_end|>"
        assert tokenizer.decode(rejected) == content["rejected"] + "<|im_end|>"
        assert [bool(mask.all()) for mask in masks] == [False, True, True]
        assert not masks[0].any()
    needed = np.concatenate([rows_of(folder, "p", split).row_contexts for split in ("train", "validation")])
    long = [json.loads(line) for line in (folder / "long.jsonl").read_text().splitlines()]
    assert report["p"]["dropped_rows"] == "long.jsonl"
    assert report["p"]["dropped"]["30"]["rows"] == (needed > 30).sum() > report["p"]["dropped"]["34"]["rows"] > 0
    assert sorted(row["tokens"] for row in long) == sorted(needed[needed > 30])  # once, whatever it is too long for
    assert {row["source"] for row in long} == {"p"}
    assert report["p"]["dropped"]["30"]["first"] == long[0]["where"]


def test_held_out_data_of_an_evaluation(prepare, tokenizer_artifact):
    tokenizer = Tokenizer.load(tokenizer_artifact / "tokenizer")
    sort = SourceConfig("embedded:tasks", options={"task": "sort", "questions": 7})
    folder, _, report = prepare({"tasks/sort": sort, "pairs/p": PAIRS}, ["validation"])
    assert {name: source["form"] for name, source in report.items()} == {"tasks/sort": "questions", "pairs/p": "pairs"}
    store = rows_of(folder, "tasks/sort", "validation")
    assert (store.rows, store.targets) == (7, 0)
    for row, content in enumerate(store.metadata()):
        said = tokenizer.decode(store.row(row).segments[0])
        assert said == tokenizer.render_text(content["prompt"], add_generation_prompt=True)
        assert content["answer"] == "".join(sorted(content["prompt"][0]["content"].split(" ")[1]))
    assert not (folder / "sources" / "tasks/sort" / "train").exists()


BROKEN = ({"text": "one"}, "{oops\n", {"text": "two"}, {"body": "three"}, {"prompt": "x", "completion": "y"})


def test_a_malformed_row_stops_the_stage_with_file_and_line(prepare, tmp_path):
    source = write_lines(tmp_path / "rows.jsonl", *BROKEN)
    with pytest.raises(UserError) as error:
        prepare({"mine": source})
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:2: is not JSON")


def test_malformed_rows_are_skipped_counted_and_listed(prepare, tmp_path):
    source = write_lines(tmp_path / "rows.jsonl", *BROKEN)
    folder, result, report = prepare({"mine": source}, on_error="skip")
    assert result.metrics["skipped"] == report["mine"]["skipped"] == 3
    rows = [json.loads(line) for line in (folder / report["mine"]["skipped_rows"]).read_text().splitlines()]
    assert [row["where"] for row in rows] == [f"{tmp_path}/rows.jsonl:{line}" for line in (2, 4, 5)]
    assert [row["source"] for row in rows] == ["mine"] * 3
    assert rows[2]["what"] == "is of form conversations, text is asked for"
    assert report["mine"]["first_skipped"].startswith(f"{tmp_path}/rows.jsonl:2 is not JSON")
    assert sum(rows_of(folder, "mine", split).rows for split in ("train", "validation")) == 2


def test_any_number_of_skipped_rows_is_listed(prepare, tmp_path):
    good = [{"text": f"one more text, number {number}"} for number in range(50)]
    half = '{"bo\\ud800dy": "a name with half a character"}\n'
    many = write_lines(tmp_path / "many.jsonl", half, *good, *["{oops\n"] * 3000)
    more = write_lines(tmp_path / "more.jsonl", "[]\n", *good)
    folder, result, report = prepare({"many": many, "more": more}, on_error="skip")
    rows = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    lines = [("many", f"{tmp_path}/many.jsonl:{line}") for line in (1, *range(52, 3052))]
    assert [(row["source"], row["where"]) for row in rows] == [*lines, ("more", f"{tmp_path}/more.jsonl:1")]
    assert "bo\ud800dy" in rows[0]["what"]
    assert report["many"]["first_skipped"].endswith(rows[0]["what"])
    assert result.metrics["skipped"] == report["many"]["skipped"] + report["more"]["skipped"] == 3002
    assert len((folder / "prepare.json").read_text()) < 3000  # counts, not rows


@pytest.mark.parametrize(("form", "fields"), [
    ("pairs", {"prompt": "p", "chosen": "c", "rejected": "r"}), ("questions", {"prompt": "p", "answer": "a"}),
    ("prompts", {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]}),
])  # fmt: skip
def test_half_a_character_in_a_rows_task_is_told_with_its_line(prepare, tmp_path, form, fields):
    source = write_lines(tmp_path / "rows.jsonl", fields, json.dumps(fields | {"task": "x"})[:-2] + '\\ud800"}\n')
    with pytest.raises(UserError, match=r'rows\.jsonl:2: "task" holds half a character'):
        prepare({"mine": source}, form=form)


def test_a_source_that_loses_all_its_rows_is_told_before_anything_trains(prepare, tmp_path):
    pair = {"prompt": "p" * 40, "chosen": "c" * 40, "rejected": "r" * 40}
    source = write_lines(tmp_path / "rows.jsonl", *({**pair, "prompt": f"{i} {pair['prompt']}"} for i in range(40)))
    with pytest.raises(
        UserError, match=r"all its 40 rows are longer than the context of 8, the first: .*rows\.jsonl:1"
    ):
        prepare({"mine": source}, form="pairs", contexts=[8])
    prepare({"mine": source}, form="pairs", contexts=[8], on_long="truncate_left")


def test_where_no_row_is_skipped_or_too_long_there_is_no_list(prepare, tmp_path):
    good = write_lines(tmp_path / "good.jsonl", *({"text": f"text {number}"} for number in range(50)))
    folder, _, report = prepare({"mine": good}, on_error="skip")
    assert not {"skipped_rows", "first_skipped", "dropped_rows"} & report["mine"].keys()
    assert not list(folder.glob("*.jsonl"))


# ---- progress ----


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, tmp_path, tokenizer_artifact, stream, **sources):
    """Prepare with each step shown; what `update` was told and what stood on the bar, of each step."""
    monkeypatch.setattr("lightning_llm.training.console.PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr("lightning_llm.stages.prepare.TOGETHER", 100)
    line, steps = Console(1, stream).stage(1, "sft.prepare", "prepare"), []
    update = line.update

    def spy(*told, **figures):
        update(*told, **figures)
        steps.append(line._bar.tasks[0].percentage if line._bar else None)

    monkeypatch.setattr(line, "update", spy)
    data = DataConfig(form="text", sources=sources, validation=0.1)
    settings = PrepareSettings(data, [], ["train", "validation"], 0)
    with line:
        run(StageContext("x", settings, {"tokenizer": tokenizer_artifact}, tmp_path / "out", ComputeConfig(), line))
        line.close()
    return steps


def test_progress_is_a_share_of_the_files_bytes_and_of_embedded_rows(monkeypatch, tmp_path, tokenizer_artifact):
    """600 documents of one length in a file; those of a domain; of a third source no more rows are taken than 150."""
    (tmp_path / "out").mkdir()
    file = write_lines(tmp_path / "file.jsonl", *({"text": f"{n:03} " + "word " * 200} for n in range(600)))
    few, web = replace(file, max_rows=150), SourceConfig("embedded:web")
    stream = io.StringIO()
    shown(monkeypatch, tmp_path, tokenizer_artifact, stream, file=file, web=web, few=few)
    lines = re.findall(r"sft.prepare  prepare\s+(\d+)%  source (\d)  tokens ", stream.getvalue())
    assert re.search(r"source 2  tokens \S+  \S+ rows/s  ETA 0:\d\d\n", stream.getvalue())
    shares = {source: [int(share) for share, of in lines if of == source] for source in "123"}
    assert shares["1"] == pytest.approx([100 * part / 6 for part in range(1, 7)], abs=12)  # a piece is a tenth of it
    assert shares["1"] == sorted(shares["1"])
    assert shares["1"][-1] == shares["2"][-1] == 100
    assert len(shares["2"]) > 1
    assert shares["2"][0] == pytest.approx(100 / len(shares["2"]), abs=20)
    assert shares["3"] == [67, 100]


def test_progress_is_a_bar_on_a_terminal(monkeypatch, tmp_path, tokenizer_artifact):
    (tmp_path / "out").mkdir()
    file = write_lines(tmp_path / "file.jsonl", *({"text": f"{n:03} " + "word " * 200} for n in range(600)))
    stream = Terminal()
    steps = shown(monkeypatch, tmp_path, tokenizer_artifact, stream, file=file)
    assert steps == pytest.approx([100 * part / 6 for part in range(1, 7)], abs=12)
    assert "━" in stream.getvalue()
    assert "ETA" in stream.getvalue()


def test_a_row_that_the_chat_template_refuses_is_malformed(prepare, tmp_path, monkeypatch):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": "system", "content": "c"}, *good["messages"]]}
    source = write_lines(tmp_path / "talks.jsonl", good, bad, good)
    strict = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    strict += "{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    load = Tokenizer.load

    def with_template(directory):
        tokenizer = load(directory)
        return Tokenizer(tokenizer.backend, strict, tokenizer.settings)

    monkeypatch.setattr(Tokenizer, "load", with_template)
    with pytest.raises(UserError, match=r"talks\.jsonl:2: .*no system role"):
        prepare({"mine": source}, form="conversations", validation=0.0)
    _, _, report = prepare({"mine": source}, form="conversations", validation=0.0, on_error="skip")
    assert report["mine"]["skipped"] == 1
    assert report["mine"]["splits"]["train"]["rows"] == 2


def test_a_tokenizer_without_turns_is_refused_once_and_named(prepare, tokenizer_artifact, tmp_path):
    """A base model's: no chat template, and none of the tokens that one could be written in."""
    base, copied = tmp_path / "base", tmp_path / "copied"
    base.mkdir()
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    backend.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    stage(copied, TokenizerSettings(TokenizerConfig(), str(base), 0))
    assert not (copied / "tokenizer" / "chat_template.jinja").exists()
    (copied / "stage.json").write_text(json.dumps({"settings": {"source": str(base)}}))  # as the runner writes it
    said = rf"^model\.tokenizer: {base} has no chat template, and no tokens .* Name a tokenizer with a chat template"
    sources = {
        "conversations": TASKS,
        "pairs": PAIRS,
        "questions": SourceConfig("embedded:tasks", options={"questions": 3}),
    }
    for form, source in sources.items():
        with pytest.raises(UserError, match=said):
            prepare({"mine": source}, form=form, on_error="skip", tokenizer=copied)
    texts = write_lines(tmp_path / "texts.jsonl", {"text": "a b"}, {"text": "c"})
    _, result, _ = prepare({"mine": texts}, validation=0.0, tokenizer=copied)
    assert result.metrics["rows"] == 2


def test_a_source_that_is_all_held_out_says_so(prepare, tmp_path):
    source = write_lines(tmp_path / "one.jsonl", {"text": "the only document"})
    with pytest.raises(UserError, match="its one row is held out by hash"):
        prepare({"mine": source}, validation=0.999)


def test_what_cannot_be_prepared_says_why(prepare, tmp_path):
    mixed = write_lines(tmp_path / "mixed.jsonl", {"text": "a"}, {"prompt": "x", "completion": "y"})
    with pytest.raises(
        UserError, match=r"mixed\.jsonl:2: is of form conversations, the rows before it are of form text"
    ):
        prepare({"mine": mixed}, form="conversations")
    with pytest.raises(UserError, match=r"embedded:preferences train 0: is of form pairs, conversations is asked for"):
        prepare({"mine": PAIRS}, form="conversations")
    empty = write_lines(tmp_path / "empty.jsonl", "\n")
    with pytest.raises(UserError, match=r"data\.sources\.mine: .*empty\.jsonl has no rows"):
        prepare({"mine": empty})
    with pytest.raises(UserError, match=r"data\.sources\.\.\./x: cannot be a folder's name"):
        prepare({"../x": TASKS})
    with pytest.raises(UserError, match=r"data\.sources: is empty"):
        prepare({})
    with pytest.raises(UserError, match=r"data\.form: is 'poems'\. Choose one of text, conversations, pairs"):
        prepare({"mine": TASKS}, form="poems")
    with pytest.raises(UserError, match=r"data\.on_error: is 'ignore'"):
        prepare({"mine": write_lines(tmp_path / "bad.jsonl", "{")}, on_error="ignore")
    with pytest.raises(
        UserError, match=r"embedded:instructions .*: is longer than the context of 20 \(\d+ such rows\)"
    ):
        prepare({"mine": TASKS}, form="conversations", contexts=[20], on_long="stop")
