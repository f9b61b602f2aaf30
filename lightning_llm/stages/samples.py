"""Rows that grow one after the other and survive a kill, and the samples of a committee read back from them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_llm.evaluation.judges import Question, Response
from lightning_llm.evaluation.questions import said

SAMPLES, VERDICTS, ROWS = "samples.jsonl", "verdicts.jsonl", "rows.jsonl"
Json = dict[str, Any]


@dataclass(frozen=True)
class Sampled:
    """A prompt with all responses to it, and the model that each of them is of."""

    question: Question
    messages: list[dict[str, str]]  # the prompt as it is rendered
    responses: list[Response]
    models: list[str]

    def to_json(self, logps: Sequence[Sequence[float]]) -> Json:
        """A line of samples.jsonl.

        Args:
            logps: of each response's tokens, in nats, in what they were drawn from.
        """
        row = {name: value for name, value in vars(self.question).items() if name != "prompt" and value is not None}
        responses = [
            {**vars(response), "model": model, "logps": [round(value, 5) for value in of_tokens]}
            for response, model, of_tokens in zip(self.responses, self.models, logps, strict=True)
        ]
        return {"prompt": self.messages, **row, "responses": responses}

    @classmethod
    def from_json(cls, row: Json) -> Sampled:
        """What `to_json` has made a line of; log-probabilities stay behind."""
        own = {name: value for name, value in row.items() if name not in ("prompt", "responses")}
        question = Question(prompt=said(row["prompt"]), **own)
        responses = [Response(each["ids"], each["text"], each["is_complete"]) for each in row["responses"]]
        return cls(question, row["prompt"], responses, [each["model"] for each in row["responses"]])


def read_rows(path: Path) -> Iterator[Json]:
    """The rows of a finished file, one by one."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def write_rows(path: Path, rows: Iterator[Json] | Sequence[Json]) -> None:
    """A file of rows, a line each."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(_line(row) for row in rows)


def grow_rows(path: Path, total: int, chunk: int, make: Callable[[int, int], list[Json]]) -> Iterator[int]:
    """Make rows chunk by chunk, each of them on disk before the next one begins; a file that is there is continued.

    What a killed process has written of a chunk is cut off and made again, so that the file does not tell whether and
    where it was interrupted, if `make` depends on its arguments alone.

    Args:
        total: rows that there will be.
        chunk: rows that are made together; the same whenever a file is continued.
        make: (first row, row after the last) -> those rows.

    Yields:
        How many rows are on disk: those that were there, and then after each chunk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    with path.open("a+b") as file:
        file.seek(0)
        end = 0
        for number, line in enumerate(iter(file.readline, b""), start=1):
            if line.endswith(b"\n") and (number % chunk == 0 or number == total):
                done, end = number, file.tell()
        file.truncate(end)
        yield done
        while done < total:
            until = min(done + chunk, total)
            file.write("".join(_line(row) for row in make(done, until)).encode())
            file.flush()
            os.fsync(file.fileno())
            done = until
            yield done


def _line(row: Json) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
