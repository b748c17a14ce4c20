"""``whisperd transcribe``: files to text through the daemon."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from whisperd.cli.common import client, exit_code, long_config_options, socket_option
from whisperd.errors import DaemonUnreachable, Error, UsageError

if TYPE_CHECKING:
    from whisperd.client import Client
    from whisperd.transcript import Transcript

FORMATS = ("txt", "srt", "vtt", "tsv", "json")
STDIN = Path("-")
NO_INPUT = 66
CANNOT_CREATE = 73
SILENCE_S = 120.0  # the daemon sends a sign of life every few seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where transcripts go: a directory, or stdout (None)."""

    formats: tuple[str, ...]
    directory: Path | None
    names: Mapping[Path, str]


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option("-m", "--model", help="Model to use (the daemon's first).")
@click.option("-l", "--language", help="Spoken language, a code or a name (detected).")
@click.option(
    "--task", type=click.Choice(["transcribe", "translate"]), default="transcribe", help="translate: to English."
)
@click.option(
    "-f", "--format", "formats", multiple=True, type=click.Choice([*FORMATS, "all"]), help="Repeatable (txt)."
)
@click.option(
    "-o", "--output-dir", "directory", type=click.Path(path_type=Path, file_okay=False), help="Write files there."
)
@click.option("--word-timestamps", is_flag=True, help="Times of words (in json).")
@click.option("--prompt", help="Text that the audio continues: names, spelling, style.")
@click.option("--temperature", type=float, help="0: Whisper's ladder of attempts.")
@click.option("--beam-size", type=int, help="Beams at temperature 0.")
@click.option("--vad-filter/--no-vad-filter", default=None, help="Transcribe only what sounds like speech.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@long_config_options
@socket_option
def transcribe(
    files: tuple[Path, ...],
    formats: tuple[str, ...],
    directory: Path | None,
    task: str,
    quiet: bool,
    config_file: Path | None,
    overrides: Sequence[str],
    socket_file: Path | None,
    **given: Any,
) -> None:
    """Transcribe audio files, or stdin ("-"), in any container.

    Text goes to stdout. With several formats or a directory, files are written.
    """
    output = plan_output(files, formats, directory)
    daemon = client(socket_file, config_file, overrides, SILENCE_S)
    job = Job(client=daemon, fields=_fields(given), translate=task == "translate", progress=_shows_progress(quiet))
    codes = [_one(job, path, output, headline=len(files) > 1) for path in files]
    sys.exit(common_code(codes))


def plan_output(files: Sequence[Path], formats: Sequence[str], directory: Path | None) -> Output:
    """Where everything will go; raises UsageError before anything is sent."""
    chosen = FORMATS if "all" in formats else tuple(dict.fromkeys(formats)) or ("txt",)
    if directory is None and len(chosen) > 1:
        directory = Path()
    if files.count(STDIN) > 1:
        raise UsageError("stdin (-) can be read only once")
    return Output(formats=chosen, directory=directory, names=_names(files))


def _names(files: Sequence[Path]) -> Mapping[Path, str]:
    """Names of results without their extension; two inputs never write one file."""
    stems = Counter(path.stem for path in set(files))
    names = {path: path.name if stems[path.stem] > 1 else path.stem for path in files} | {STDIN: "stdin"}
    twice = [name for name, count in Counter(names[path] for path in set(files)).items() if count > 1]
    if twice:
        raise UsageError(f"two inputs are called {twice[0]}; transcribe them one after the other with their own -o")
    return names


def common_code(codes: Sequence[int]) -> int:
    """0 when all went well; the common code when all failed alike; else 1."""
    kinds = set(codes)
    return kinds.pop() if len(kinds) == 1 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is the same for every file."""

    client: Client
    fields: Mapping[str, str]
    translate: bool
    progress: bool


def _one(job: Job, path: Path, output: Output, *, headline: bool) -> int:
    """Transcribes one file and delivers it; its failure is told, and the others go on."""
    try:
        with _opened(path) as file:
            transcript = _ask(job, path, file)
    except DaemonUnreachable:
        raise  # the other files would meet the same
    except Error as error:
        click.echo(f"whisperd: {path}: {error}", err=True)
        return exit_code(error)
    except OSError as error:
        click.echo(f"whisperd: {path}: {error.strerror}", err=True)
        return NO_INPUT
    return _deliver(transcript, path, output, headline=headline)


def _ask(job: Job, path: Path, file: BinaryIO) -> Transcript:
    from whisperd.formats import from_verbose_json

    with _progress(path, shown=job.progress) as on_event:
        answer = job.client.transcribe(
            file, filename=path.name, fields=job.fields, on_event=on_event, translate=job.translate
        )
    return from_verbose_json(answer)


def _deliver(transcript: Transcript, path: Path, output: Output, *, headline: bool) -> int:
    if output.directory is None:
        if headline:
            click.echo(f"==> {path} <==")
        click.echo(written(transcript, output.formats[0]), nl=False)
        return 0
    try:
        output.directory.mkdir(parents=True, exist_ok=True)
        for name in output.formats:
            target = output.directory / f"{output.names[path]}.{name}"
            target.write_text(written(transcript, name), encoding="utf-8")
            click.echo(f"{path} -> {target}", err=True)
    except OSError as error:
        click.echo(f"whisperd: cannot write {error.filename}: {error.strerror}", err=True)
        return CANNOT_CREATE
    return 0


def written(transcript: Transcript, name: str) -> str:
    """A transcript in one of the file formats."""
    from whisperd import formats

    writers: Mapping[str, Callable[[Transcript], str]] = {
        "txt": formats.txt,
        "srt": formats.srt,
        "vtt": formats.vtt,
        "tsv": formats.tsv,
        "json": formats.json,
    }
    return writers[name](transcript)


def _fields(given: Mapping[str, Any]) -> dict[str, str]:
    """Options that were given, as fields of the HTTP interface."""
    fields = {name: str(value) for name, value in given.items() if value is not None and not isinstance(value, bool)}
    if given["word_timestamps"]:
        fields["word_timestamps"] = "true"
    if given["vad_filter"] is not None:
        fields["vad_filter"] = str(given["vad_filter"]).lower()
    return fields


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if path == STDIN:
        yield sys.stdin.buffer
        return
    with path.open("rb") as file:
        yield file


def _shows_progress(quiet: bool) -> bool:
    return not quiet and sys.stderr.isatty()


@contextmanager
def _progress(path: Path, *, shown: bool) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """A bar in seconds of audio, on a terminal."""
    if not shown:
        yield lambda _kind, _data: None
        return
    from tqdm import tqdm

    with tqdm(
        desc=path.name, unit="s", leave=False, bar_format="{desc}: {percentage:3.0f}% {bar} {n:.0f}/{total:.0f} s"
    ) as bar:

        def on_event(kind: str, data: dict[str, Any]) -> None:
            if kind == "whisperd.progress":
                bar.total = data["total_s"] or bar.total or data["done_s"]
                bar.update(data["done_s"] - bar.n)

        yield on_event
