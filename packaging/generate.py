"""``python packaging/generate.py``: writes the files that follow from the command line and the declared options.

Man pages, shell completions, and the whisperd.toml that is shipped and that of the package; a test holds them equal to
what this makes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from whisperd.cli import EXIT_CODES, cli
from whisperd.config import Option, options, render
from whisperd.config.catalog import table_of, type_text
from whisperd.config.models import ModelTable
from whisperd.config.options import Config
from whisperd.version import VERSION

HERE = Path(__file__).parent
CACHE_DIR = "/var/cache/whisperd"

ENVIRONMENT = {
    "WHISPERD_CONFIG": "The configuration file, when there is no -c.",
    "WHISPERD_ADDOPTS": "Options -o KEY=VALUE that come before those of the command line.",
    "WHISPERD_SOCKET": "The socket, when server.socket is not set.",
    "WHISPER_MODEL": "The model, when the configuration declares none.",
    "HF_TOKEN": "Token for the Hub; after the systemd credential hf-token, before HUGGINGFACE_TOKEN, "
    "HUGGING_FACE_HUB_TOKEN and the token file.",
    "HF_HUB_CACHE": "The cache, when cache_dir is not set; before HUGGINGFACE_HUB_CACHE, TRANSFORMERS_CACHE, HF_HOME.",
}
FILES = {
    "/etc/whisperd/whisperd.toml": "Configuration of the service. Others are looked for first: -c, $WHISPERD_CONFIG, "
    "./whisperd.toml, $XDG_CONFIG_HOME/whisperd/whisperd.toml; the first one found is the only one read.",
    "/run/whisperd.sock": "The socket of the service, for root and the group whisperd.",
    "/var/cache/whisperd": "The models: a plain Hugging Face cache.",
    "/etc/credstore/hf-token": "Token for the Hub, given to the service alone.",
}


def generated() -> Mapping[Path, str]:
    """The text of each generated file."""
    return {
        HERE / "man/whisperd.1": "\n".join(program_page()) + "\n",
        HERE / "man/whisperd.toml.5": "\n".join(file_page()) + "\n",
        HERE / "completions/bash/whisperd": completion(BashComplete),
        HERE / "completions/zsh/_whisperd": completion(ZshComplete),
        HERE / "completions/fish/whisperd.fish": completion(FishComplete),
        HERE / "etc/whisperd.toml": render({"cache_dir": CACHE_DIR}),
        HERE.parent / "whisperd.toml": render(),
    }


def completion(shell: type[ShellComplete]) -> str:
    """The script of click, made without running the shell to find its version."""
    complete = shell(cli, {}, "whisperd", "_WHISPERD_COMPLETE")
    return (complete.source_template % complete.source_vars()).strip() + "\n"


def program_page() -> Iterator[str]:
    """The manual page whisperd(1)."""
    yield from head("WHISPERD", 1, "whisperd", cli.help or "")
    yield from (".SH SYNOPSIS", r"\fBwhisperd\fR \fICOMMAND\fR [\fIOPTIONS\fR]", ".SH COMMANDS")
    for name, command in cli.commands.items():
        yield from command_section(name, command)
    yield from (".SH EXIT STATUS", ".TS", "l l.")
    for code, meaning in re.findall(r"(\d+) ([A-Za-z ]+?)(?= {2,}|\n|$)", EXIT_CODES):
        yield f"{code}\t{escaped(meaning)}"
    yield from (".TE", ".SH ENVIRONMENT", *definitions(ENVIRONMENT))
    yield from (".SH FILES", *definitions(FILES))
    yield from (".SH SEE ALSO", r"\fBwhisperd.toml\fR(5), \fBsystemctl\fR(1), \fBjournalctl\fR(1)")


def command_section(name: str, command: click.Command) -> Iterator[str]:
    """The section of one command, with its arguments and options."""
    context = click.Context(
        command, info_name=name, parent=click.Context(cli, info_name="whisperd", **cli.context_settings)
    )
    yield f".SS whisperd {escaped(name)} {escaped(' '.join(command.collect_usage_pieces(context)))}"
    yield from paragraphs(command.help or "")
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            yield from (".TP", rf"\fB{escaped(record[0])}\fR", escaped(record[1]))


def file_page() -> Iterator[str]:
    """The manual page whisperd.toml(5)."""
    yield from head("WHISPERD.TOML", 5, "whisperd.toml", "what whisperd serves, and how.")
    yield ".SH DESCRIPTION"
    yield from paragraphs(
        "A file in TOML. Every option has a default; the smallest file declares a model and nothing else. An option "
        "that is unknown, or has a value that it cannot have, makes the whole file invalid: whisperd config --check "
        "lists every mistake. Options marked (restart) change with the next restart of the daemon, all others with a "
        "reload."
    )
    yield from (".SH OPTIONS", *(line for option in options() if "." not in option.key for line in described(option)))
    yield from (".SS A model", *paragraphs("is a string, which is its repo, or a table with:"))
    for name, field in ModelTable.model_fields.items():
        yield from (".TP", rf"\fB{name}\fR ({escaped(type_text(field))})", escaped(field.description or ""))
    for name, field in Config.model_fields.items():
        table = table_of(field)
        if table is not None:
            yield from (f".SH TABLE [{name}]", *paragraphs(table.__doc__ or ""))
            yield from (line for option in options() if option.key.startswith(f"{name}.") for line in described(option))
    yield from (".SH FILES", *definitions(FILES), ".SH SEE ALSO", r"\fBwhisperd\fR(1)")


def described(option: Option) -> Iterator[str]:
    """The entry of one option."""
    note = f"{option.type}; restart" if option.reload == "restart" else option.type
    yield from (".TP", rf"\fB{escaped(option.key.rpartition('.')[2])}\fR = {escaped(option.default)} ({escaped(note)})")
    yield escaped(option.help)


def head(title: str, section: int, name: str, summary: str) -> Iterator[str]:
    """The first lines of a page."""
    yield from ("'\\\" t", r".\" Generated by packaging/generate.py.")
    yield f'.TH {title} {section} "" "whisperd {VERSION}"'
    line = summary.strip().splitlines()[0].rstrip(".")
    yield from (".SH NAME", rf"{name} \- {escaped(line[0].lower() + line[1:])}")


def definitions(terms: Mapping[str, str]) -> Iterator[str]:
    """A list of terms with their meaning."""
    for term, meaning in terms.items():
        yield from (".TP", rf"\fB{escaped(term)}\fR", escaped(meaning))


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of text, rewrapped."""
    for paragraph in re.split(r"\n\s*\n", text.replace("\b\n", "").strip()):
        yield from (".PP", escaped(" ".join(paragraph.split())))


def escaped(text: str) -> str:
    """Text with the characters escaped that roff gives a meaning."""
    plain = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{plain}" if plain.startswith((".", "'")) else plain


if __name__ == "__main__":
    for path, content in generated().items():
        path.write_text(content, encoding="utf-8")
