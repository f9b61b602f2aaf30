"""Chat templates: Jinja in a sandbox, with what templates written for transformers expect to find there."""

from __future__ import annotations

import functools
import json
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """The tag {% generation %}: transformers' way of marking in a template what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser):
        """What stands between the tag and its end, as a call of `_mark` on it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = nodes.ContextReference()
        return nodes.CallBlock(self.call_method("_mark", [marks]), [], [], body).set_lineno(line)

    def _mark(self, context, caller) -> str:
        opening, closing = context["span_marks"]
        return opening + caller() + closing


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: unlike Jinja's own it keeps <, > and & as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def compile_template(chat_template: str) -> Template:
    """A template in Jinja's sandbox: it comes with a tokenizer, which may be anyone's.

    It is rendered with `span_marks`, the two marks to put around what the assistant says.
    """

    def raise_exception(message: str):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(chat_template)
