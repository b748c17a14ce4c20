"""The declared options as a list, and values as TOML text: for messages, help texts and the shipped file."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from whisperd.config.options import Config, Reload

TYPE_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean"}
SHOWN_CHARS = 60

SECRET = re.compile(r"token|secret|passw|credential|api_?key", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(hf|api_org)_\w{4,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One declared option; ``default`` is TOML text, ``""`` where it is not set."""

    key: str
    type: str
    default: str
    help: str
    reload: Reload


def options() -> Iterator[Option]:
    """All options in the order of their declaration, those of the top level first."""
    for name, field in Config.model_fields.items():
        if (table := table_of(field)) is None:
            yield _option(name, field)
        else:
            yield from (_option(f"{name}.{inner}", declared) for inner, declared in table.model_fields.items())


def table_of(field: FieldInfo) -> type[BaseModel] | None:
    """The table that a field of Config holds; None for a plain option."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _option(key: str, field: FieldInfo) -> Option:
    extra = typing.cast("dict[str, Reload]", field.json_schema_extra)
    return Option(
        key=key,
        type=type_text(field),
        default=toml_text(field.default),
        help=field.description or "",
        reload=extra["reload"],
    )


def type_text(field: FieldInfo) -> str:
    """The type and bounds of a field in words: ``integer, 1 to 32``."""
    lowest, highest = (
        next((getattr(bound, name) for bound in field.metadata if hasattr(bound, name)), None) for name in ("ge", "le")
    )
    return f"{_type_name(field.annotation)}{_bounds(lowest, highest)}"


def _bounds(lowest: float | None, highest: float | None) -> str:
    if lowest is not None and highest is not None:
        return f", {lowest} to {highest}"
    if lowest is not None:
        return f", at least {lowest}"
    return f", at most {highest}" if highest is not None else ""


def _type_name(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is typing.Literal:
        return " | ".join(map(toml_text, arguments))
    if origin in (typing.Union, UnionType):
        return _type_name(arguments[0])
    if origin is tuple:
        return f"array of {_type_name(arguments[0])}s"
    return TYPE_NAMES.get(typing.cast("type", annotation), "model")


def toml_text(value: object) -> str:
    """Formats a value as one line of TOML, which parses to the same value; an option that is not set is ``""``."""
    if value is None:
        return '""'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(toml_text, value))}]"
    if isinstance(value, dict):
        return _inline_table(value)
    return str(value)


def _inline_table(table: dict[str, object]) -> str:
    if not table:
        return "{}"
    return f"{{ {', '.join(f'{key} = {toml_text(value)}' for key, value in table.items())} }}"


def shown(key: str, value: object) -> str:
    """A value as a message quotes it: shortened, and hidden if it may be a secret."""
    text = toml_text(value)
    if SECRET.search(key) or SECRET_VALUE.search(text):
        return "a value that is not shown"
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 3]}..."
