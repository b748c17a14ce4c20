"""Loads the configuration: finds the file, merges it with ``-o`` and variables, and reports all mistakes at once."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tomli
from pydantic import ValidationError

from whisperd.config.catalog import options, shown
from whisperd.config.environment import expand, home, offline_variable
from whisperd.config.options import DEFAULT_MODEL, Config
from whisperd.config.problems import Keys, explain, key_text, lines_of
from whisperd.errors import ConfigError, Problem
from whisperd.files import read_small
from whisperd.version import VERSION

ADDOPTS_WORD = re.compile(r"--option=|--option$|-o")
KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
FILE_BYTES = 1 << 20
QUOTES_AND_BRACKETS = ('"', "'", "[", "{")

ADDOPTS = "$WHISPERD_ADDOPTS"
WHISPER_MODEL = "$WHISPER_MODEL"
OVERRIDE = "-o"
DEFAULT = "default"

# Former option -> the one that took its place; the former name is read, with a warning.
RENAMED: dict[str, str] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A valid configuration and its sources.

    ``origins`` maps the dotted key of each option to what set it: ``default``, a file, ``-o`` or a variable.
    ``shadowed`` are files that were found and not read.
    """

    config: Config
    path: Path | None
    shadowed: tuple[Path, ...]
    overrides: tuple[str, ...]
    origins: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def header(self) -> str:
        """One line for the log: the file, the overrides, and the files that were not read."""
        line = f"config: {self.path or 'built-in defaults'}"
        if self.overrides:
            line += f" ({', '.join(f'-o {text}' for text in self.overrides)})"
        if self.shadowed:
            line += f" (ignoring {', '.join(map(str, self.shadowed))})"
        return line


@dataclass(slots=True)
class Draft:
    """A configuration that is being merged: the values, what set each, and the mistakes so far."""

    document: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    lines: Mapping[Keys, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def read(self, path: Path, named_by: str) -> None:
        """Adds the options of a file."""
        try:
            text = read_small(path, FILE_BYTES).decode("utf-8-sig")
            document = tomli.loads(text)
        except tomli.TOMLDecodeError as error:
            self.wrong(f"{path}:{error.lineno}:{error.colno}", f"not TOML: {_lower(error.msg)}")
        except UnicodeDecodeError as error:
            self.wrong(
                str(path), f"is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}; save it as UTF-8"
            )
        except OSError as error:
            self.wrong(str(path), f"cannot be read: {error.strerror}{named_by}")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, hundreds of nested arrays
            self.wrong(str(path), f"not TOML: {_lower(str(error))}")
        else:
            self.file, self.lines = path, lines_of(text)
            self.put_all(document, str(path))

    def override(self, text: str, origin: str) -> None:
        """Adds one ``key=value``."""
        try:
            keys, value = parse_override(text)
        except ConfigError as error:
            self.problems += (
                Problem(where=origin, key=problem.key, message=problem.message) for problem in error.problems
            )
        else:
            self.put_all(value, origin, keys)

    def put_all(self, value: object, origin: str, above: tuple[str, ...] = ()) -> None:
        """Sets each option of a table; the new name of an option wins over its former one."""
        for keys, leaf in sorted(_leaves(value, above), key=lambda found: ".".join(found[0]) not in RENAMED):
            self.put(keys, leaf, origin)

    def put(self, keys: tuple[str, ...], value: object, origin: str) -> None:
        """Sets one option."""
        if new := RENAMED.get(".".join(keys)):
            self.warnings.append(f"{origin}: {'.'.join(keys)} is now called {new}")
            keys = tuple(new.split("."))
        table = self.document
        for depth, key in enumerate(keys[:-1], 1):
            below = table.setdefault(key, {})
            if not isinstance(below, dict):
                self.wrong(origin, f"{'.'.join(keys[:depth])} is a value, not a table", ".".join(keys))
                return
            table = below
        table[keys[-1]] = _with_tuples(value)
        self.origins[".".join(keys)] = origin

    def where(self, keys: Keys) -> str:
        """The file and line, the option or the variable that set a key."""
        origin = self._origin(keys)
        if origin and origin != str(self.file):
            return origin
        line = next((self.lines[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in self.lines), None)
        return f"{self.file}:{line}" if line else str(self.file or "")

    def _origin(self, keys: Keys) -> str | None:
        for end in range(len(keys), 0, -1):
            if origin := self.origins.get(key_text(keys[:end])):
                return origin
        inside = f"{key_text(keys)}."
        return next((self.origins[key] for key in reversed(self.origins) if key.startswith(inside)), None)

    def wrong(self, where: str, message: str, key: str = "") -> None:
        """Records a mistake."""
        self.problems.append(Problem(where=where, key=key, message=message))


def load(
    explicit: Path | None = None, overrides: Sequence[str] = (), *, environ: Mapping[str, str], cwd: Path
) -> Loaded:
    """Loads the configuration in effect; raises ConfigError with every problem.

    Args:
        explicit: the file of ``-c``.
        overrides: the ``key=value`` of each ``-o``, in their order.
        environ: the environment.
        cwd: the directory where ``./whisperd.toml`` may be.
    """
    draft = Draft()
    path, shadowed, named_by = find(explicit, environ, cwd)
    if path is not None:
        draft.read(path, named_by)
    added = _addopts(draft, environ.get("WHISPERD_ADDOPTS", ""))
    for text in added:
        draft.override(text, ADDOPTS)
    for text in overrides:
        draft.override(text, OVERRIDE)
    if variable := offline_variable(environ):
        draft.put(("reconcile", "offline"), True, f"${variable}")
    _default_model(draft, environ.get("WHISPER_MODEL", "").strip())
    return Loaded(
        config=_validate(draft),
        path=path,
        shadowed=shadowed,
        overrides=(*added, *overrides),
        origins=MappingProxyType({option.key: draft.origins.get(option.key, DEFAULT) for option in options()}),
        warnings=tuple(draft.warnings),
    )


def find(explicit: Path | None, environ: Mapping[str, str], cwd: Path) -> tuple[Path | None, tuple[Path, ...], str]:
    """The file to read, the files that it shadows, and a hint at what named it; a named file need not exist."""
    if explicit is not None:
        return cwd / explicit, (), "; check -c"
    if named := environ.get("WHISPERD_CONFIG"):
        return cwd / expand(named, environ), (), "; check $WHISPERD_CONFIG"
    found = [path for path in search_path(environ, cwd) if _is_file(path)]
    return (found[0], tuple(found[1:]), "") if found else (None, (), "")


def search_path(environ: Mapping[str, str], cwd: Path) -> tuple[Path, ...]:
    """The places of a whisperd.toml without ``-c``; only the first one that exists is read."""
    user = Path(environ.get("XDG_CONFIG_HOME") or home(environ) / ".config")
    return cwd / "whisperd.toml", user / "whisperd/whisperd.toml", Path("/etc/whisperd/whisperd.toml")


def parse_override(text: str) -> tuple[tuple[str, ...], object]:
    """Parses ``decode.beam_size=1`` to ``(("decode", "beam_size"), 1)``; raises ConfigError.

    The right side is TOML; a bare word that is not TOML is a string.
    """
    key, equals, raw = (part.strip() for part in text.partition("="))
    if not equals or not KEY.fullmatch(key):
        raise ConfigError(Problem(where=OVERRIDE, key="", message=f"expects KEY=VALUE, got {shown('', text)}"))
    try:
        document = tomli.loads(f"value = {raw}\n")
    except tomli.TOMLDecodeError as error:
        if raw.startswith(QUOTES_AND_BRACKETS):
            message = f"expects a TOML value, got {shown(key, raw)}: {_lower(error.msg)}"
            raise ConfigError(Problem(where=OVERRIDE, key=key, message=message)) from error
        document = {"value": raw}
    except (ValueError, RecursionError) as error:
        message = f"expects a TOML value, got {shown(key, raw)}: {_lower(str(error))}"
        raise ConfigError(Problem(where=OVERRIDE, key=key, message=message)) from error
    if document.keys() != {"value"}:
        raise ConfigError(Problem(where=OVERRIDE, key=key, message=f"expects one value, got {shown(key, raw)}"))
    return tuple(key.split(".")), document["value"]


def _addopts(draft: Draft, text: str) -> tuple[str, ...]:
    """The ``key=value`` of each ``-o`` in $WHISPERD_ADDOPTS, which may hold no other options."""
    try:
        words = iter(shlex.split(text))
    except ValueError as error:
        draft.wrong(ADDOPTS, f"cannot be split into words: {_lower(str(error))}")
        return ()
    added = []
    for word in words:
        option = ADDOPTS_WORD.match(word)
        value = word[option.end() :] or next(words, None) if option else None
        if value is None:
            draft.wrong(ADDOPTS, f"expects only -o KEY=VALUE, got {shown('', word)}")
        else:
            added.append(value)
    return tuple(added)


def _default_model(draft: Draft, named: str) -> None:
    """Sets the model if none is declared; else warns that the declaration overrules WHISPER_MODEL."""
    if draft.document.get("models") not in (None, ()):
        if named:
            draft.warnings.append(f"{WHISPER_MODEL} is ignored: {draft.where(('models',))} declares the models")
    elif named:
        draft.put(("models",), (named,), WHISPER_MODEL)
    else:
        draft.document["models"] = (DEFAULT_MODEL,)
        draft.origins.pop("models", None)


def _validate(draft: Draft) -> Config:
    if refusal := _refusal(draft):
        raise ConfigError(refusal)
    try:
        config = Config.model_validate(draft.document)
    except ValidationError as error:
        raise ConfigError(*draft.problems, *explain(error.errors(include_url=False), draft.where)) from error
    if draft.problems:
        raise ConfigError(*draft.problems)
    return config


def _refusal(draft: Draft) -> Problem | None:
    """The only problem of a file for another version of whisperd, whose other mistakes may be none there."""
    wanted = draft.document.get("requires")
    if not isinstance(wanted, str):
        return None
    from packaging.specifiers import InvalidSpecifier, SpecifierSet  # 30 ms that few files need

    try:
        fits = SpecifierSet(wanted).contains(VERSION, prereleases=True)
    except InvalidSpecifier:
        return None
    if fits:
        return None
    message = f"expects whisperd {wanted}, this is {VERSION}"
    return Problem(where=draft.where(("requires",)), key="requires", message=message)


def _leaves(value: object, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(value, dict) and (value or not above):
        for key, inner in value.items():
            yield from _leaves(inner, (*above, key))
    else:
        yield above, value


def _with_tuples(value: object) -> object:
    if isinstance(value, list):
        return tuple(map(_with_tuples, value))
    if isinstance(value, dict):
        return {key: _with_tuples(inner) for key, inner in value.items()}
    return value


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a directory that this user may not enter
        return False


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
