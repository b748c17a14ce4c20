"""Values as TOML text, for messages and for the shipped file."""

from __future__ import annotations

import json
import re

WIDTH_CHARS = 60

SECRET = re.compile(r"token|secret|passw|credential|api_?key", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(hf|api_org)_\w{4,}")


def toml_text(value: object) -> str:
    """One line of TOML that reads back as the same value; an option that is not set reads ``""``."""
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
    """The value for a message: short, and hidden where it may be a secret."""
    text = toml_text(value)
    if SECRET.search(key) or SECRET_VALUE.search(text):
        return "a value that is not shown"
    return text if len(text) <= WIDTH_CHARS else f"{text[: WIDTH_CHARS - 3]}..."
