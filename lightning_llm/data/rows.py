"""What a row is: one of five forms, told by its fields, and in the same shape wherever it was read.

    text           {"text": str}
    conversations  {"messages": [{"role", "content"}, ...]}
    pairs          {"prompt": messages, "chosen": str, "rejected": str}, and what a reward model may learn of them:
                   "strength" (1 to 4, or a word of STRENGTHS), "edited" (a third response, better than the chosen one),
                   "grades" ({"chosen": {...}, "rejected": {...}, "edited": {...}}, of GRADED, from 0 to 2)
    questions      {"prompt": messages, "answer": str, "task": str}      to be answered and scored; nothing is learnt
    prompts        the same; the answer may be unknown (""), and only who asks for this form gets it

`LAYOUTS` lists the fields in which people keep these: prompt and completion, ShareGPT's and Alpaca's, pairs with their
prompt inside. A turn may spell its fields `from` and `value` in each of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning_llm.data.config import GRADED
from lightning_llm.settings import UserError

if TYPE_CHECKING:
    from lightning_llm.data.tokenizer import Message

FORMS = ("text", "conversations", "pairs", "questions", "prompts")
ROLES = ("system", "user", "assistant", "tool")
SPELLINGS = {  # of roles: ours, and those of ShareGPT and its kin
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
}
STRENGTHS = {"negligibly": 1, "slightly": 2, "clearly": 3, "significantly": 4}  # how much better the chosen one is
HIGHEST_GRADE = 2
SKIP = "or leave such rows out with data.on_error=skip"

Fields = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One row and where it came from."""

    where: str  # "pairs.jsonl:1374", "embedded:code argparse.py"
    form: str  # one of FORMS
    content: Fields
    split: str | None = None  # "train" or "validation" where the source decides; otherwise a hash of the content does
    layout: str = field(default="", compare=False)  # how it was kept, as "ShareGPT's conversations"

    def is_held_out(self, share: float) -> bool:
        """Whether the row belongs to the held-out `share`: the same answer wherever and whenever it is asked."""
        if self.split is not None:
            return self.split == "validation"
        shared = self.content.get("prompt", self.content)  # no prompt of a pair or question is in both splits
        identity = json.dumps(shared, sort_keys=True, ensure_ascii=False)
        digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < share * 2**64


@dataclass(frozen=True)
class Layout:
    """Fields in which rows of a form are kept, and how they are read."""

    name: str
    form: str
    needs: tuple[str, ...]
    read: Callable[[Fields, str], Fields]  # (row, where) -> content
    also: tuple[str, ...] = ()  # fields that it uses where they are there


def read_row(fields: Any, columns: Mapping[str, str], where: str, asked: str | None = None) -> Row:
    """Check one row and bring it into its form's shape.

    Args:
        fields: what the file holds.
        columns: our field -> the file's column, where they differ; dots lead into nested ones.
        where: file and line.
        asked: the form that is wanted, of a row that can be read as several.

    Raises:
        UserError: it is none of the forms, or a field is not what it should be.
    """
    if not isinstance(fields, dict):
        raise UserError(where, f"is {_kind(fields)} and not an object with fields", f"Mend it, {SKIP}")
    row = {**fields, **{ours: _column(fields, theirs, where) for ours, theirs in columns.items()}}
    row = {name: value for name, value in row.items() if value is not None}  # a column that a table leaves empty
    layout = _layout(row, set(columns), asked)
    if layout is None:
        raise _no_field(where, _missing(row), row)
    return Row(where, layout.form, layout.read(row, where), layout=layout.name)


def _layout(row: Fields, named: set[str], asked: str | None) -> Layout | None:
    """The layout of a row: of the form that is asked for if there is one, and with the fields that `columns` names."""
    if asked in (None, "pairs") and ("chosen" in row) != ("rejected" in row):
        return None
    known = [layout for layout in LAYOUTS if layout.form != "prompts" or asked == "prompts"]
    found = [layout for layout in known if row.keys() >= set(layout.needs)]
    found = [layout for layout in found if named <= {*layout.needs, *layout.also}] or found
    wanted = [layout for layout in found if layout.form == asked]
    return next(iter(wanted or found), None)


def _missing(row: Fields) -> str:
    """The field that would make a row of it."""
    for there, missing in (("chosen", "rejected"), ("rejected", "chosen"), ("prompt", "completion"),
                           ("instruction", "output"), ("output", "instruction")):  # fmt: skip
        if there in row and missing not in row:
            return missing
    return "text"


def _column(fields: Fields, path: str, where: str) -> Any:
    """The value of a column; `data.body` is the column of that name, or else the field body of the column data."""
    if path in fields:
        return fields[path]
    value: Any = fields
    for depth, name in enumerate(path.split(".")):
        if value is None:  # a nested column that a table leaves empty
            return None
        if not isinstance(value, dict) or name not in value:
            inside = ".".join(path.split(".")[:depth])
            raise _no_field(where, path, value if isinstance(value, dict) else {}, inside)
        value = value[name]
    return value


# ---- pairs ----


def _pair_behind_prompt(row: Fields, where: str) -> Fields:
    prompt = _messages(row, "prompt", where)
    before, answers = _answers(row, where)
    if before["chosen"] == before["rejected"] and _contains(before["chosen"], prompt):
        prompt = before["chosen"]  # the whole prompt is inside, `prompt` is a part of it
    return {"prompt": prompt, **_behind(prompt, before, answers, where), **_known(row, where)}


def _pair_behind_conversation(row: Fields, where: str) -> Fields:
    before, answers = _answers(row, where)
    prompt = before["chosen"] or _messages(row, "conversations", where)
    return {"prompt": prompt, **_behind(prompt, before, answers, where), **_known(row, where)}


def _pair_of_conversations(row: Fields, where: str) -> Fields:
    """Two whole conversations: what they share is the prompt."""
    chosen, rejected = _messages(row, "chosen", where), _messages(row, "rejected", where)
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        raise UserError(where, 'has no "prompt", and chosen and rejected differ before their last turn',
                        f"Give the prompt as a field, {SKIP}")  # fmt: skip
    answers = {"chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    return {"prompt": chosen[:-1], **answers, **_known(row, where)}


def _answers(row: Fields, where: str) -> tuple[dict[str, list[Message]], dict[str, str]]:
    """The assistant's last turn in `chosen` and in `rejected`, and the turns before it in each."""
    before, answers = {}, {}
    for name in ("chosen", "rejected"):
        *before[name], answer = _messages(row, name, where, "assistant")
        if answer["role"] != "assistant":
            raise UserError(where, f'"{name}" does not end in a turn of the assistant', f"Mend it, {SKIP}")
        answers[name] = answer["content"]
    return before, answers


def _behind(
    prompt: list[Message], before: dict[str, list[Message]], answers: dict[str, str], where: str
) -> dict[str, str]:
    """The answers, if what stands before each of them is the prompt or nothing."""
    for name, turns in before.items():
        if turns and turns != prompt:
            what = f'"{name}" has turns before its answer that are not those of "prompt"'
            raise UserError(where, what, f"Leave the prompt out, or give the answer alone, {SKIP}")
    return answers


def _contains(turns: list[Message], part: list[Message]) -> bool:
    return turns[: len(part)] == part or turns[-len(part) :] == part


def _known(row: Fields, where: str) -> Fields:
    """What a judge of correctness needs, and what a reward model learns beside which response is better."""
    known: Fields = {name: _encodable(str(row[name]), f'"{name}"', where) for name in ("answer", "task") if name in row}
    if "edited" in row:
        known["edited"] = _messages(row, "edited", where, "assistant")[-1]["content"]
    if "strength" in row:
        known["strength"] = _strength(row["strength"], where)
    if "grades" in row:
        known["grades"] = _grades(row["grades"], where)
    return known


def _strength(value: Any, where: str) -> int:
    strength = STRENGTHS.get(value, 0) if isinstance(value, str) else value
    if isinstance(strength, bool) or strength not in STRENGTHS.values():
        words = ", ".join(f"{number} ({word})" for word, number in STRENGTHS.items())
        raise UserError(where, f'"strength" is {value!r}', f"Give {words}, {SKIP}")
    return int(strength)


def _grades(value: Any, where: str) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for response, grades in value.items() if isinstance(value, dict) else [("", None)]:
        if response not in ("chosen", "rejected", "edited") or not isinstance(grades, dict | None):
            what = f'"grades" has {response!r}' if response else f'"grades" is {_kind(value)}'
            raise UserError(where, what, f"Give an object of chosen, rejected and edited, {SKIP}")
        found[response] = {name: grade for name, grade in (grades or {}).items() if grade is not None}
        for name, grade in found[response].items():
            if name not in GRADED or isinstance(grade, bool) or grade not in range(HIGHEST_GRADE + 1):
                remedy = f"Give {', '.join(GRADED)} as numbers from 0 to {HIGHEST_GRADE}, {SKIP}"
                raise UserError(where, f'"grades" of {response} has {name} {grade!r}', remedy)
    return found


# ---- conversations, questions, text ----


def _conversation_in(name: str) -> Callable[[Fields, str], Fields]:
    def read(row: Fields, where: str) -> Fields:
        messages = _messages(row, name, where)
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError(where, "the assistant says nothing, so there is nothing to learn", f"Mend it, {SKIP}")
        return {"messages": messages}

    return read


def _completion(row: Fields, where: str) -> Fields:
    return {"messages": _messages(row, "prompt", where) + _messages(row, "completion", where, "assistant")}


def _instruction(row: Fields, where: str) -> Fields:
    """Alpaca's: the input, where there is one, stands below the instruction. The chat template frames it."""
    asked, given = _string(row, "instruction", where), row.get("input", "")
    if not isinstance(given, str):
        raise UserError(where, f'"input" is {_kind(given)} and not text', f"Mend it, {SKIP}")
    if given.strip():
        asked += "\n\n" + _encodable(given, '"input"', where)
    said = _string(row, "output", where)
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def _question(row: Fields, where: str) -> Fields:
    answer = _string(row, "answer", where)
    content = {"prompt": _messages(row, "prompt", where), "answer": answer, "task": _task(row, "questions", where)}
    return content | ({"tests": _string(row, "tests", where)} if "tests" in row else {})


def _prompt(row: Fields, where: str) -> Fields:
    content = {"prompt": _messages(row, "prompt", where), "answer": "", "task": _task(row, "prompts", where)}
    return content | {name: _string(row, name, where) for name in ("answer", "tests") if name in row}


def _prompt_of_conversation(row: Fields, where: str) -> Fields:
    """All that stands before the assistant's last turn, which is to be said anew."""
    messages = _messages(row, "messages", where)
    said = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    prompt = messages[: said[-1]] if said else messages
    if not prompt:
        raise UserError(where, "has no turn before the assistant's, so nothing is asked", f"Mend it, {SKIP}")
    return {"prompt": prompt, "answer": "", "task": _task(row, "prompts", where)}


def _text(row: Fields, where: str) -> Fields:
    return {"text": _string(row, "text", where)}


JUDGED = ("answer", "task", "strength", "edited", "grades")
LAYOUTS = (  # of several that fit the first counts, but for the form that is asked for
    Layout("prompt, chosen, rejected", "pairs", ("prompt", "chosen", "rejected"), _pair_behind_prompt, JUDGED),
    Layout(
        "conversations, chosen, rejected",
        "pairs",
        ("conversations", "chosen", "rejected"),
        _pair_behind_conversation,
        JUDGED,
    ),
    Layout("chosen and rejected with their prompt", "pairs", ("chosen", "rejected"), _pair_of_conversations, JUDGED),
    Layout("messages", "conversations", ("messages",), _conversation_in("messages")),
    Layout("prompt and completion", "conversations", ("prompt", "completion"), _completion),
    Layout("prompt and answer", "questions", ("prompt", "answer"), _question, ("task", "tests")),
    Layout("prompt", "prompts", ("prompt",), _prompt, ("answer", "task", "tests")),
    Layout("messages up to the last answer", "prompts", ("messages",), _prompt_of_conversation, ("task",)),
    Layout("text", "text", ("text",), _text),
    Layout("ShareGPT's conversations", "conversations", ("conversations",), _conversation_in("conversations")),
    Layout("Alpaca's instruction, input, output", "conversations", ("instruction", "output"), _instruction, ("input",)),
)
ROW_FIELDS = tuple(sorted({name for layout in LAYOUTS for name in (*layout.needs, *layout.also)}))  # keys of `columns`


# ---- fields ----


def _messages(row: Fields, name: str, where: str, role: str = "user") -> list[Message]:
    """A field as messages: as they are, or a string as one message of `role`."""
    value = row[name]
    if isinstance(value, str):
        return [{"role": role, "content": _string(row, name, where)}]
    turns = _turns(value)
    if not turns:
        raise UserError(where, f'"{name}" is {_kind(value)} and not text or a list of messages', f"Mend it, {SKIP}")
    return [_message(turn, f'turn {number} of "{name}"', where) for number, turn in enumerate(turns, 1)]


def _turns(value: Any) -> list | None:
    """A list of turns; one turn alone is a list of one, and turns kept by column are put together."""
    if isinstance(value, dict) and (spelling := _spelling(value)):
        columns = [value[name] for name in spelling]
        if all(isinstance(column, list) for column in columns):
            return [dict(zip(spelling, turn, strict=True)) for turn in zip(*columns, strict=False)]
        return [value]
    return value if isinstance(value, list) else None


def _spelling(turn: Fields) -> tuple[str, str] | None:
    spellings = (("role", "content"), ("from", "value"))
    return next((spelling for spelling in spellings if turn.keys() >= set(spelling)), None)


def _message(turn: Any, what: str, where: str) -> Message:
    spelling = _spelling(turn) if isinstance(turn, dict) else None
    if spelling is None:
        raise UserError(where, f"{what} has no role and content", f"Mend it, {SKIP}")
    role, content = (turn[name] for name in spelling)
    if not isinstance(role, str) or role not in SPELLINGS:
        raise UserError(where, f"{what} has the role {role!r}", f"Use {', '.join(ROLES)}, {SKIP}")
    if not isinstance(content, str):
        raise UserError(where, f"{what} has {_kind(content)} as content and not text", f"Mend it, {SKIP}")
    return {"role": SPELLINGS[role], "content": _encodable(content, what, where)}


def _string(row: Fields, name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise UserError(where, f'"{name}" is {_kind(value)} and not text', f"Mend it, {SKIP}")
    if not value.strip():
        raise UserError(where, f'"{name}" is empty', f"Fill it, {SKIP}")
    return _encodable(value, f'"{name}"', where)


def _task(row: Fields, otherwise: str, where: str) -> str:
    """What a question's task is called in tables."""
    return _encodable(str(row.get("task", otherwise)), '"task"', where)


def _encodable(value: str, what: str, where: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"{what} holds half a character at {error.start} (a lone surrogate)"
        raise UserError(where, half, f"Mend it, {SKIP}") from None
    return value


def _no_field(where: str, name: str, row: Fields, inside: str = "") -> UserError:
    found = ", ".join(map(str, row)) or "nothing"
    place = f" in {inside}" if inside else ""
    what = f'no field "{name}" (found{place}: {found})'
    return UserError(where, what, f"Add it, name its column in `columns`, {SKIP}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def first_line(error: Exception) -> str:
    """What an error of a library says, short enough for a line."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
