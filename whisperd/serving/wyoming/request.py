"""From the events of a client to the options of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from whisperd.errors import RequestError
from whisperd.speech.fallback import Options
from whisperd.speech.languages import language_code


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A ``transcribe`` event. A ``model`` of None is the default one."""

    options: Options
    model: str | None = None


def parse_request(data: Mapping[str, Any], defaults: Options) -> Request:
    """A ``transcribe`` event; raises RequestError.

    Names come before terms, as the protocol ranks them: of too many hot words the last are dropped. The context of
    earlier turns has no form that is agreed upon, so nothing is made of it.
    """
    language = _text(data, "language")
    words = (*_texts(data, "transcript_names"), *_texts(data, "transcript_terms"))
    options = replace(defaults, hotwords=(*defaults.hotwords, *words))
    if language and language.lower() != "auto":
        options = replace(options, language=language_code(language[:80]))
    return Request(options=options, model=_text(data, "name"))


def _text(data: Mapping[str, Any], name: str) -> str | None:
    found = data.get(name)
    if found is not None and not isinstance(found, str):
        raise RequestError(f"{name} must be text, got {str(found)[:80]!r}", param=name)
    return found.strip() or None if found else None


def _texts(data: Mapping[str, Any], name: str) -> Sequence[str]:
    found = data.get(name) or []
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise RequestError(f"{name} must be a list of texts, got {str(found)[:80]!r}", param=name)
    return [one.strip() for one in found if one.strip()]
