"""The configuration as text: the shipped whisperd.toml, the effective values, and what a reload would change."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType

from whisperd.config.catalog import Option, options, table_of, toml_text, type_text
from whisperd.config.load import Loaded
from whisperd.config.models import ModelTable
from whisperd.config.options import DEFAULT_MODEL, Config, Reload

WIDTH_CHARS = 112

INTRODUCTION = """\
# whisperd.toml: what whisperd serves, and how. Every option is shown with its default; remove the # to change it,
# then `systemctl reload whisperd`. Options marked "restart" wait for a restart. "" is: not set.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """The value of an option as TOML text, what set it, and when a change takes effect."""

    key: str
    value: str
    origin: str
    reload: Reload


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """An option that differs between two configurations, its values as TOML text."""

    key: str
    old: str
    new: str
    reload: Reload


def effective(loaded: Loaded) -> tuple[Effective, ...]:
    """The values of all options."""
    return tuple(
        Effective(
            key=option.key,
            value=_text(loaded.config, option.key),
            origin=loaded.origins[option.key],
            reload=option.reload,
        )
        for option in options()
    )


def diff(old: Config, new: Config) -> tuple[Change, ...]:
    """The options that a reload from ``old`` to ``new`` changes."""
    changes = (
        Change(key=option.key, old=_text(old, option.key), new=_text(new, option.key), reload=option.reload)
        for option in options()
    )
    return tuple(change for change in changes if change.old != change.new)


def render(chosen: Mapping[str, object] = MappingProxyType({})) -> str:
    """Renders the shipped whisperd.toml: all options with their help, all but ``models`` commented out.

    ``chosen`` maps dotted keys to values that the file sets.
    """
    declared = {option.key: option for option in options()}
    parts = [INTRODUCTION]
    for name, field in Config.model_fields.items():
        if (table := table_of(field)) is None:
            parts.append("\n".join(_top_level(declared[name], chosen)))
        else:
            inner = (line for key in table.model_fields for line in _option(declared[f"{name}.{key}"], key, chosen))
            parts.append("\n".join((f"# {table.__doc__}", f"[{name}]", *inner)))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def model_text(model: ModelTable) -> str:
    """Formats a declared model in the shortest form that whisperd.toml can have."""
    reference = model.source.shortest
    further = {
        key: value
        for key, value in model
        if key not in ("repo", "revision") and value != type(model).model_fields[key].default
    }
    return toml_text({"repo": reference, **further}) if further else toml_text(reference)


def _text(config: Config, key: str) -> str:
    if key == "models":
        return f"[{', '.join(map(model_text, config.models))}]"
    return toml_text(reduce(getattr, key.split("."), config))


def _top_level(option: Option, chosen: Mapping[str, object]) -> Iterator[str]:
    if option.key != "models":
        return _option(option, option.key, chosen)
    return _models(option)


def _models(option: Option) -> Iterator[str]:
    yield from _comment(f"{option.help} Each is a string, or a table with repo and any of:")
    for name, field in ModelTable.model_fields.items():
        yield from _comment(f"  {name}: {field.description} ({type_text(field)})")
    yield f"models = {toml_text([DEFAULT_MODEL])}"


def _option(option: Option, name: str, chosen: Mapping[str, object]) -> Iterator[str]:
    note = f"{option.type}; restart" if option.reload == "restart" else option.type
    yield from _comment(f"{option.help} ({note})")
    yield f"{name} = {toml_text(chosen[option.key])}" if option.key in chosen else f"#{name} = {option.default}"


def _comment(text: str) -> Iterator[str]:
    return (f"# {line}" for line in textwrap.wrap(text, WIDTH_CHARS, subsequent_indent="    "))
