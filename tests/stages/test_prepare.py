"""From sources to token stores: what is learnt, what is held out, what is skipped, and who is told."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest

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
    def run_(sources, splits=("train", "validation"), contexts=(), **data):
        config = DataConfig(sources=sources, **data)
        settings = PrepareSettings(config, list(contexts), list(splits), 0)
        folder, result = stage(tmp_path / "prepared", settings, tokenizer=tokenizer_artifact)
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
    folder, _, report = prepare({"p": PAIRS}, form="pairs", contexts=[30])
    store = rows_of(folder, "p", "validation")
    for row, content in enumerate(store.metadata()):
        (prompt, chosen, rejected), masks = store.row(row)
        assert tokenizer.decode(prompt) == tokenizer.render_text(content["prompt"], add_generation_prompt=True)
        assert tokenizer.decode(chosen) == content["chosen"] + "<|im_end|>"
        assert tokenizer.decode(rejected) == content["rejected"] + "<|im_end|>"
        assert [bool(mask.all()) for mask in masks] == [False, True, True]
        assert not masks[0].any()
    dropped = report["p"]["dropped"]["30"]
    long = sum(int((rows_of(folder, "p", split).row_contexts > 30).sum()) for split in ("train", "validation"))
    assert dropped["rows"] == len(dropped["where"]) == long > 0


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
    lines = [row["where"].rpartition(":")[2] for row in report["mine"]["skipped_rows"]]
    assert lines == ["2", "4", "5"]
    assert report["mine"]["skipped_rows"][2]["what"] == "is of form conversations, text is asked for"
    assert sum(rows_of(folder, "mine", split).rows for split in ("train", "validation")) == 2


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
