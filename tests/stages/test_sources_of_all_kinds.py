"""The same rows make the same tokens, whatever they are kept in; and what is damaged says so in one line."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from lightning_llm.data.config import DataConfig, SourceConfig
from lightning_llm.data.gauge import Gauge, expected_rows
from lightning_llm.data.sources import open_source
from lightning_llm.settings import UserError
from lightning_llm.stages import prepare
from lightning_llm.stages.config import PrepareSettings

TURNS = [[f"what follows {i}?", f"{i + 1}, of course"] for i in range(80)]
CHATS = [
    {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), t, strict=True)]} for t in TURNS
]
TEXTS = [{"text": f"Document {i}.\nIts second line, with ümläuts and 漢字 " + "again " * (i % 7)} for i in range(80)]
PAIRS = [{"prompt": q, "chosen": a, "rejected": "who knows"} for q, a in TURNS]
ROWS = {"text": TEXTS, "conversations": CHATS, "pairs": PAIRS}
ROOT = Path(__file__).parents[2]


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_jsonl(folder, rows):
    (folder / "rows.jsonl").write_bytes(lines(rows))
    return SourceConfig(str(folder / "rows.jsonl"))


def write_gzip(folder, rows):
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines(rows[:30])) + gzip.compress(lines(rows[30:])))
    return SourceConfig(str(folder / "*.gz"))


def write_zstd(folder, rows):
    frames = [zstandard.ZstdCompressor().compress(lines(part)) for part in (rows[:30], rows[30:])]
    (folder / "rows.jsonl.zst").write_bytes(b"".join(frames))
    return SourceConfig(str(folder))


def write_array(folder, rows):
    (folder / "rows.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), "utf-8")
    return SourceConfig(str(folder / "rows.json"))


def write_parquet(folder, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=11)
    (folder / "README.md").write_text("What the rows are.")
    return SourceConfig(str(folder))


def write_nested(folder, rows):
    (folder / "rows.jsonl").write_bytes(lines({"id": i, "data": {"of": {"it": row}}} for i, row in enumerate(rows)))
    return SourceConfig(str(folder / "rows.jsonl"), columns={name: f"data.of.it.{name}" for name in rows[0]})


def write_datasets(folder, rows):
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"), num_shards=3)
    return SourceConfig(str(folder / "saved"))


def write_splits(folder, rows):
    import datasets

    one = datasets.Dataset.from_list(rows)
    splits = {"train": one.select(range(5)), "mine": one.with_format("torch", columns=[])}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "saved"))
    return SourceConfig(str(folder / "saved"), options={"split": "mine"})


def write_repository(folder, rows):
    """As a data set lies on the hub: read by the same function of the library."""
    card = "---\nconfigs:\n- config_name: small\n  data_files:\n  - {split: sft, path: data/sft-*}\n---\n# Rows\n"
    (folder / "data").mkdir()
    (folder / "README.md").write_text(card)
    (folder / "data" / "sft-00000.jsonl").write_bytes(lines(rows))
    return SourceConfig(f"hub:{folder}", options={"config": "small", "split": "sft"})


def write_texts(folder, rows):
    for number, row in enumerate(rows):
        path = folder / f"{number // 10:03}" / f"{number:03}.{'md' if number % 2 else 'txt'}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(row["text"], "utf-8")
    return SourceConfig(str(folder))


def write_paragraphs(folder, rows):
    (folder / "all.txt.gz").write_bytes(gzip.compress("\n\n \n".join(row["text"] for row in rows).encode()))
    return SourceConfig(str(folder), options={"documents": "paragraph"})


def write_sharegpt(folder, rows):
    spelt = {"user": "human", "assistant": "gpt"}
    turns = [[{"from": spelt[m["role"]], "value": m["content"]} for m in row["messages"]] for row in rows]
    (folder / "rows.jsonl").write_bytes(lines({"id": "x", "conversations": each} for each in turns))
    return SourceConfig(str(folder))


def write_alpaca(folder, rows):
    said = [[message["content"] for message in row["messages"]] for row in rows]
    table = [{"instruction": q, "input": "", "output": a, "text": f"### {q}{a}"} for q, a in said]
    (folder / "rows.json").write_text(json.dumps(table))
    return SourceConfig(str(folder))


def write_ultrafeedback(folder, rows):
    def whole(row, name):
        return [{"content": row["prompt"], "role": "user"}, {"content": row[name], "role": "assistant"}]

    names = ("chosen", "rejected")
    table = [{**row, **{n: whole(row, n) for n in names}, "messages": whole(row, "chosen"), "score": 1} for row in rows]
    return write_parquet(folder, table)


EVERYWHERE = (write_gzip, write_zstd, write_array, write_parquet, write_nested, write_datasets, write_splits)
KINDS = [(form, kind) for form in ROWS for kind in (*EVERYWHERE, write_repository)]
KINDS += [("text", write_texts), ("text", write_paragraphs), ("pairs", write_ultrafeedback)]
KINDS += [("conversations", write_sharegpt), ("conversations", write_alpaca)]


@pytest.fixture(scope="module")
def prepared_from(context_of, tokenizer_artifact):
    """`prepared_from(source, form)` -> the artifact's folder, and what the console said."""

    def make(source, form="text", **changes):
        data = DataConfig("mine", form, {"mine": source}, validation=0.1, **changes)
        settings = PrepareSettings(data, [] if form == "text" else [24, 512], ["train", "validation"], 0)
        context = context_of(settings, {"tokenizer": tokenizer_artifact})
        prepare.run(context)
        return context.output, context.console.stream.getvalue()

    return make


def stores(artifact: Path) -> dict[str, bytes]:
    files = sorted(file for file in (artifact / "sources").rglob("*") if file.is_file())
    return {file.relative_to(artifact).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def plain(prepared_from, tmp_path_factory):
    """The tokens of plain jsonl."""
    return {
        form: prepared_from(write_jsonl(tmp_path_factory.mktemp("plain"), rows), form)[0] for form, rows in ROWS.items()
    }


@pytest.mark.filterwarnings("ignore")  # of the library that reads the folders
@pytest.mark.parametrize(("form", "write"), KINDS, ids=[f"{form} {kind.__name__[6:]}" for form, kind in KINDS])
def test_the_same_rows_make_the_same_tokens(form, write, plain, prepared_from, tmp_path):
    artifact, said = prepared_from(write(tmp_path, ROWS[form]), form)
    assert stores(artifact) == stores(plain[form])
    assert f"mine is read as {form}: " in said
    report = json.loads((artifact / "prepare.json").read_text())["sources"]["mine"]
    assert sum(report["layouts"].values()) == len(ROWS[form])
    long = json.loads((plain[form] / "prepare.json").read_text())["sources"]["mine"]["dropped"]
    assert {context: rows["rows"] for context, rows in report["dropped"].items()} == {
        context: rows["rows"] for context, rows in long.items()
    }


def test_the_console_says_which_form_was_taken(prepared_from, tmp_path):
    _, said = prepared_from(write_sharegpt(tmp_path, CHATS), "conversations")
    assert said.count("mine is read as conversations: ShareGPT's conversations") == 1


@pytest.mark.filterwarnings("ignore")  # of the library that reads the folders
@pytest.mark.parametrize("write", [write_jsonl, *EVERYWHERE, write_texts, write_paragraphs, write_repository])
def test_every_reader_tells_how_much_has_been_read(write, tmp_path):
    """Rows of one length, hard to compress: the share of the bytes is that of the rows, but for what is read ahead."""
    if write in (write_texts, write_datasets, write_splits, write_repository, write_parquet):
        rows = [{"text": os.urandom(50).hex()} for _ in range(80)]
        ahead = 0.0
    else:
        rows = [{"text": os.urandom(400).hex()} for _ in range(2000)]
        ahead = 0.2  # 128 KiB, in which gzip reads, of some 800
    source = write(tmp_path, rows)
    if write is write_repository:  # the card of a data set may say how many rows there are
        card = "configs:\n- config_name: small\n  data_files:\n  - {split: sft, path: data/sft-*}\n"
        card += "dataset_info:\n- config_name: small\n  features:\n  - {name: text, dtype: string}\n"
        card += "  splits:\n  - {name: sft, num_bytes: 1, num_examples: 80}\n"
        (tmp_path / "README.md").write_text(f"---\n{card}---\n")
    gauge = Gauge()
    shares = [gauge.share for _ in open_source(source, "mine").rows(gauge=gauge)]
    assert len(shares) == len(rows)
    assert shares[-1] == 1
    assert shares == sorted(shares)
    for number, share in enumerate(shares, 1):
        assert -0.01 <= share - number / len(rows) <= ahead + 0.01


def test_who_cannot_tell_shows_no_share(tmp_path):
    gauge = Gauge()
    rows = list(open_source(write_repository(tmp_path, TEXTS), "mine").rows(gauge=gauge))
    assert len(rows) == len(TEXTS)
    assert gauge.share is None
    assert expected_rows(80, None, None) is None
    assert [expected_rows(50, 0.25, most) for most in (None, 1000, 80)] == [200, 200, 80]


# ---- tokens that are there ----


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("inside", ["", "sources/mine"])
def test_prepared_tokens_are_taken_as_they_are(form, inside, plain, prepared_from, monkeypatch):
    from lightning_llm.data.tokenizer import Tokenizer

    for name in ("encode_documents", "render_many", "render_pairs"):
        monkeypatch.delattr(Tokenizer, name)  # nothing is tokenised
    artifact, said = prepared_from(SourceConfig(str(plain[form] / inside)), form)
    assert stores(artifact) == stores(plain[form])
    assert "mine is taken as tokens from" in said
    reports = [json.loads((a / "prepare.json").read_text())["sources"]["mine"] for a in (artifact, plain[form])]
    assert reports[0]["splits"] == reports[1]["splits"]
    rows = [{context: long["rows"] for context, long in report["dropped"].items()} for report in reports]
    assert rows[0] == rows[1]


def test_prepared_tokens_of_another_tokenizer_form_or_share_are_refused(plain, prepared_from, tmp_path, context_of):
    from lightning_llm.data.config import TokenizerConfig
    from lightning_llm.data.tokenizer import Tokenizer
    from lightning_llm.stages.config import TokenizerSettings

    mine = SourceConfig(str(plain["text"]))
    with pytest.raises(UserError, match=r"mine: .* holds text, pairs is asked for"):
        prepared_from(mine, "pairs")
    settings = PrepareSettings(DataConfig("m", "text", {"mine": mine}, validation=0.1), [], ["train"], 0)
    other = context_of(TokenizerSettings(TokenizerConfig(270, {"t": write_jsonl(tmp_path, TEXTS)}), "train", 0))
    prepare.run(other)
    with pytest.raises(UserError, match="another tokenizer") as error:
        prepare.run(context_of(settings, {"tokenizer": other.output}))
    assert Tokenizer.load(other.output / "tokenizer").fingerprint[:8] in str(error.value)
    assert json.loads((plain["text"] / "prepare.json").read_text())["tokenizer"][:8] in str(error.value)
    assert "model.tokenizer=" in str(error.value)
    facts = plain["text"] / "prepare.json"
    before = facts.read_text()
    facts.write_text(json.dumps({**json.loads(before), "validation": 0.01}))
    try:
        with pytest.raises(UserError, match=r"0\.01 of the rows were held out, 0\.1 are asked for"):
            prepared_from(mine)
    finally:
        facts.write_text(before)


# ---- what cannot be read ----


def damaged(tmp_path):
    many = lines({"text": f"{i} {os.urandom(30).hex()}"} for i in range(12_000))
    zst, gz = zstandard.ZstdCompressor(write_checksum=True).compress(many), gzip.compress(many)
    flipped = bytearray(zst)
    flipped[len(zst) // 2] ^= 0xFF
    broken = bytearray(gz)
    broken[-6] ^= 0xFF  # of the check sum
    csv = b"text,label\nhello,1\n"
    return {
        "cut zstd": ("a.jsonl.zst", zst[: len(zst) // 2], r"a\.jsonl\.zst:\d{3,}: cannot be read .*zstd file ends in"),
        "flipped zstd": ("a.jsonl.zst", bytes(flipped), r"a\.jsonl\.zst:\d+: cannot be read from here on \(zstd"),
        "cut gzip": ("a.jsonl.gz", gz[: len(gz) // 2], r"a\.jsonl\.gz:\d{3,}: cannot be read .*gzip file ends in"),
        "check sum": ("a.jsonl.gz", bytes(broken), r"a\.jsonl\.gz:\d+: cannot be read .*CRC"),
        "gzip as zstd": ("a.jsonl.zst", gz, r"is gzip by its content\. Name it a\.jsonl\.gz\."),
        "zstd as plain": ("a.jsonl", zst, r"is zstd by its content\. Name it a\.jsonl\.zst\."),
        "plain as gzip": ("a.jsonl.gz", many, r"a\.jsonl\.gz:1: cannot be read .*Not a gzipped file"),
        "plain as zstd": ("a.jsonl.zst", many, r"a\.jsonl\.zst:1: cannot be read .*Unknown frame"),
        "parquet as jsonl": ("a.jsonl", b"PAR1....", r"a\.jsonl: is parquet by its content"),
        "cut text": ("a.txt.gz", gz[:1000], r"a\.txt\.gz: cannot be read to its end \(the gzip file ends"),
        "no parquet": ("a.parquet", b"PAR1....", r"a\.parquet: cannot be read as parquet"),
        "CSV": ("a.csv", csv, r"a\.csv: is of an unknown kind\. .*convert others, as CSV"),
        "CSV as jsonl": ("a.jsonl", csv, r"a\.jsonl:1: is not JSON .*looks like the head of a CSV table"),
        "empty": ("a.jsonl", b"", r"a\.jsonl: is empty\. Fill it, or take it away"),
        "empty inside": ("a.jsonl.zst", zstandard.compress(b""), r"a\.jsonl\.zst has no rows"),
        "cut array": ("a.json", b'[{"text": "a"},\n{"text": "b"}\n', r"a\.json:3: the array has no end"),
        "wrong array": ("a.json", b'[{"text": "a"},\n{text: "b"}]' + b" " * 99, r"a\.json:2: is not JSON"),
    }


@pytest.mark.parametrize("case", damaged(None))
def test_what_is_damaged_says_so_in_one_line(case, prepared_from, tmp_path):
    name, content, message = damaged(tmp_path)[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        prepared_from(SourceConfig(str(tmp_path / name)))
    assert "\n" not in str(error.value)


def test_a_malformed_row_is_named_where_it_lies(prepared_from, tmp_path):
    """By line in compressed files and arrays, by row in tables, by split and row in saved data sets; or skipped."""
    rows = [*TEXTS[:40], {"text": ""}, *TEXTS[40:]]
    places = {}
    for write in (write_gzip, write_zstd, write_array, write_parquet, write_datasets):
        (tmp_path / write.__name__).mkdir()
        places[write] = write(tmp_path / write.__name__, rows)
    expected = {
        write_gzip: "rows.jsonl.gz:41",
        write_zstd: "rows.jsonl.zst:41",
        write_array: "rows.json:122",
        write_parquet: "rows.parquet: row 41",
        write_datasets: "saved train: row 41",
    }
    for write, where in expected.items():
        with pytest.raises(UserError) as error:
            prepared_from(places[write])
        assert f'{where}: "text" is empty' in str(error.value)
        artifact, said = prepared_from(places[write], on_error="skip")
        report = json.loads((artifact / "prepare.json").read_text())["sources"]["mine"]
        assert report["skipped"] == 1
        [row] = map(json.loads, (artifact / "skipped.jsonl").read_text().splitlines())
        assert row["where"].endswith(where)
        assert "1 malformed rows of mine skipped" in said


def test_a_source_of_malformed_rows_alone_says_how_they_begin(prepared_from, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([{"body": "x"}] * 3))
    with pytest.raises(UserError, match=r"no row that can be used \(3 are malformed, the first: .*a\.jsonl:1 no field"):
        prepared_from(SourceConfig(str(tmp_path / "a.jsonl")), on_error="skip")


# ---- memory ----

MEASURED = """
import io, sys
from pathlib import Path
from lightning_llm.data.config import DataConfig, SourceConfig
from lightning_llm.stages import prepare
from lightning_llm.stages.config import ComputeConfig, PrepareSettings
from lightning_llm.stages.context import StageContext
from lightning_llm.training.console import Console
source, tokenizer, output = sys.argv[1:]
Path(output).mkdir()
data = DataConfig("mine", "text", {"mine": SourceConfig(source)}, validation=0.01)
console = Console(1, io.StringIO()).stage(1, "x", "prepare")
settings = PrepareSettings(data, [], ["train", "validation"], 0)
prepare.run(StageContext("x", settings, {"tokenizer": Path(tokenizer)}, Path(output), ComputeConfig(), console))
# not getrusage's: that of a child begins at its parent's
print(next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux's /proc")
def test_memory_does_not_grow_with_the_file(tokenizer_artifact, tmp_path):
    """330,000 short rows against 30,000: a list of them, of their names or of their lengths would show."""
    peaks = []
    for rows in (30_000, 330_000):
        path = tmp_path / f"{rows}.jsonl.zst"
        with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
            for number in range(rows):
                file.write(b'{"text": "%07d one two"}\n' % number)
        words = [sys.executable, "-c", MEASURED, str(path), str(tokenizer_artifact), str(tmp_path / f"{rows}")]
        done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout))
    assert peaks[1] < peaks[0] + 16, peaks  # MiB
