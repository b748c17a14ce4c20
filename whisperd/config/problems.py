"""Turns the errors of pydantic into problems that name the option, the line, and what was expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from whisperd.config.catalog import SECRET, SECRET_VALUE, options, shown, table_of
from whisperd.config.models import ModelTable
from whisperd.config.options import Config
from whisperd.errors import Problem

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Keys = tuple[str | int, ...]

HEADER = re.compile(r"\s*(\[\[?)\s*([\w.\"'\s-]+?)\s*\]\]?\s*(?:#.*)?$")
ASSIGNMENT = re.compile(r"\s*([\w.\"'-]+(?:\s*\.\s*[\w\"'-]+)*)\s*=")

# Type of a pydantic error -> what was expected, a format of the error's context.
EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "an array",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "finite_number": "a finite number",
    "too_short": "at least {min_length} element",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "a name without spaces",
    "literal_error": "{expected}",
}


def explain(errors: Iterable[ErrorDetails], where: Callable[[Keys], str]) -> Iterator[Problem]:
    """Yields one Problem for each error; ``where`` returns the file and line, or the option, that set a key."""
    for error in errors:
        keys = error["loc"]
        yield Problem(where=where(keys), key=key_text(keys), message=_message(error))


def key_text(keys: Keys) -> str:
    """``("models", 0, "repo")`` as ``models[0].repo``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def _message(error: ErrorDetails) -> str:
    kind, keys, given = error["type"], error["loc"], error["input"]
    key, context = key_text(keys), error.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown(keys)
    if kind == "missing":
        return "is required"
    if kind == "value_error":
        return SECRET_VALUE.sub("(not shown)", str(context["error"]))
    if kind == "model_type":
        expected = "a model string or table" if keys[0] == "models" else "a table"
    else:
        expected = EXPECTED[kind].format_map(context) if kind in EXPECTED else error["msg"]
    return f"expects {expected}, got {shown(key, given)}"


def unknown(keys: Keys) -> str:
    """The message for a key that no table declares."""
    name = str(keys[-1])
    if SECRET.search(name):
        return "unknown option; a token belongs in the systemd credential hf-token or in $HF_TOKEN, never in a file"
    homes = [option.key.rpartition(".")[0] for option in options() if option.key.rpartition(".")[2] == name]
    if homes:
        places = " or ".join(f"in [{home}]" if home else "at the top, before the first [table]" for home in homes)
        return f"unknown option here; it belongs {places}"
    return f"unknown option{_did_you_mean(name, _siblings(keys))}"


def _siblings(keys: Keys) -> list[str]:
    if len(keys) == 1:
        return list(Config.model_fields)
    if keys[0] == "models":
        return list(ModelTable.model_fields)
    table = table_of(Config.model_fields[str(keys[0])])
    return list(table.model_fields) if table else []


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower().replace("-", "_"), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def lines_of(text: str) -> dict[Keys, int]:
    """The line of each key and table header, counted from 1.

    Found by regular expressions and not by a parser, which is enough for messages. A key inside an inline table or an
    array has the line of the option that holds it.
    """
    lines: dict[Keys, int] = {}
    table: Keys = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := HEADER.match(line):
            table = _parts(header[2])
            if header[1] == "[[":
                table += (sum(keys[:-1] == table for keys in lines),)
            lines.setdefault(table, number)
        elif assignment := ASSIGNMENT.match(line):
            lines.setdefault(table + _parts(assignment[1]), number)
    return lines


def _parts(key: str) -> Keys:
    return tuple(part.strip().strip("\"'") for part in key.split("."))
