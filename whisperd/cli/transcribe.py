"""``whisperd transcribe``: transcribes files with the daemon."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from whisperd.cli.inputs import STDIN, count_stdin, expand
from whisperd.cli.options import client, config_options, exit_code, socket_option, warn_of_renamed
from whisperd.cli.outputs import FORMATS, Output, written
from whisperd.cli.progress import Progress, progress
from whisperd.cli.temporary_daemon import temporary_daemon
from whisperd.errors import (
    Cancelled,
    DaemonUnreachable,
    Error,
    ExitCode,
    RemoteError,
    SocketPermissionError,
    UsageError,
)

if TYPE_CHECKING:
    from whisperd.client import Client
    from whisperd.speech.subtitles import Layout
    from whisperd.speech.transcript import Transcript

SILENCE_S = 120.0  # the daemon sends an event or a comment every few seconds
ATTEMPTS = 20  # for a daemon that is busy and says when to come back
PASSING = (429, 503)


@click.command(short_help="Transcribe audio and video files.")
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
    "-d", "--output-dir", "directory", type=click.Path(path_type=Path, file_okay=False), help="Write files there."
)
@click.option("--overwrite", is_flag=True, help="Transcribe files again whose results exist.")
@click.option("-j", "--jobs", type=click.IntRange(1, 256), default=1, help="Files at the same time (1).")
@click.option("--live", is_flag=True, help="Print each segment with its times as soon as it is decoded.")
@click.option("--standalone", is_flag=True, help="Start a daemon for this command alone.")
@click.option("--word-timestamps", is_flag=True, help="Times of words (in json).")
@click.option("--readable", is_flag=True, help="Subtitles of two lines of 42 characters, shown long enough to be read.")
@click.option(
    "--max-line-width", type=click.IntRange(10, 200), help="The same, with lines of at most so many characters."
)
@click.option("--max-line-count", type=click.IntRange(1, 4), help="The same, with at most so many lines.")
@click.option("--prompt", help="Text that the audio continues: names, spelling, style.")
@click.option("--hotwords", help="Words and names that are likely, with commas between them.")
@click.option("--audio-track", help="Audio track: a number from 0, or a language (the default one).")
@click.option("--temperature", type=float, help="0: Whisper's ladder of attempts.")
@click.option("--beam-size", type=int, help="Beams at temperature 0.")
@click.option("--vad-filter/--no-vad-filter", default=None, help="Transcribe only what sounds like speech.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@config_options
@socket_option
def transcribe(  # click passes each option as an argument
    files: tuple[Path, ...],
    formats: tuple[str, ...],
    directory: Path | None,
    task: str,
    config_file: Path | None,
    overrides: Sequence[str],
    socket_file: Path | None,
    standalone: bool,
    **given: Any,
) -> None:
    """Transcribe audio and video files, or stdin ("-"), in any container.

    FILE may be a directory, which is searched recursively, or a pattern. Text goes to stdout. With several formats or
    an output directory, files are written; inputs whose files exist are skipped, so that a batch can be resumed.
    """
    overrides, directory = _former_output_dir(overrides, directory)
    output = replace(plan_output(files, formats, directory), layout=_layout(given))
    try:
        output.prepare()
    except OSError as error:
        click.echo(f"whisperd: cannot write {output.directory}: {error.strerror}", err=True)
        sys.exit(ExitCode.CANNOT_CREATE)
    with (
        _daemon(standalone, socket_file, config_file, overrides, quiet=given["quiet"]) as daemon,
        progress("transcribing", shown=_shows_progress(given["quiet"]), live=given["live"]) as shown,
    ):
        job = Job(
            client=daemon,
            fields=_fields(given),
            translate=task == "translate",
            output=output,
            progress=shown,
            live=given["live"],
        )
        codes = job.run(_wanted(output, overwrite=given["overwrite"]), given["jobs"])
    sys.exit(common_code(codes))


def plan_output(files: Sequence[Path], formats: Sequence[str], directory: Path | None) -> Output:
    """Plans the output files; raises UsageError before anything is sent."""
    chosen = FORMATS if "all" in formats else tuple(dict.fromkeys(formats)) or ("txt",)
    if directory is None and len(chosen) > 1:
        directory = Path()
    if count_stdin(files) > 1:
        raise UsageError("stdin (-) can be read only once")
    return Output(formats=chosen, directory=directory, names=expand(files))


def _former_output_dir(overrides: Sequence[str], directory: Path | None) -> tuple[Sequence[str], Path | None]:
    """Takes an ``-o`` that sets no option for the directory that it named at first, with a warning."""
    former = [text for text in overrides if "=" not in text]
    for text in former:
        warn_of_renamed("transcribe", "-o", text)
    kept = [text for text in overrides if "=" in text]
    return kept, directory or (Path(former[-1]) if former else None)


def _layout(given: Mapping[str, Any]) -> Layout | None:
    from whisperd.speech.subtitles import Layout

    measures = {"line_chars": given["max_line_width"], "lines": given["max_line_count"]}
    asked = {name: value for name, value in measures.items() if value is not None}
    return Layout(**asked) if asked or given["readable"] else None


def _wanted(output: Output, *, overwrite: bool) -> list[Path]:
    """The files to transcribe: all, or those without results; prints how many are skipped."""
    wanted = [path for path in output.names if overwrite or not output.is_done(path)]
    done = len(output.names) - len(wanted)
    if done:
        click.echo(
            f"{done} of {len(output.names)} files have their results already (--overwrite does them again)", err=True
        )
    return wanted


def common_code(codes: Sequence[int]) -> int:
    """The code of all files if it is the same for each; else 1."""
    kinds = set(codes) or {0}
    return kinds.pop() if len(kinds) == 1 else 1


@contextmanager
def _daemon(
    standalone: bool, socket_file: Path | None, config_file: Path | None, overrides: Sequence[str], *, quiet: bool
) -> Iterator[Client]:
    if not standalone:
        with _hinting_at_standalone():
            yield client(socket_file, config_file, overrides, SILENCE_S)
        return
    from whisperd.client import Client

    arguments = ["-c", str(config_file)] if config_file else []
    arguments += [part for override in overrides for part in ("-o", override)]

    def say(text: str) -> None:
        if _shows_progress(quiet):
            click.echo(text, err=True)

    with tempfile.TemporaryDirectory(prefix="whisperd-") as name, temporary_daemon(Path(name), arguments, say) as path:
        yield Client(path, SILENCE_S)


@contextmanager
def _hinting_at_standalone() -> Iterator[None]:
    """Adds the hint at ``--standalone`` to the error that no daemon answers."""
    try:
        yield
    except SocketPermissionError:
        raise
    except DaemonUnreachable as error:
        raise DaemonUnreachable(f"{error}; without a daemon: whisperd transcribe --standalone") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """The result of one file; ``transcript`` is None if its output files were written."""

    transcript: Transcript | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A batch of files and what is the same for each of them."""

    client: Client
    fields: Mapping[str, str]
    translate: bool
    output: Output
    progress: Progress
    live: bool
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self, files: Sequence[Path], n_parallel: int) -> list[int]:
        """Transcribes all files, ``n_parallel`` at a time, and prints in order; returns the exit code of each."""
        pool = ThreadPoolExecutor(n_parallel)
        futures = {path: pool.submit(self._transcribe, path) for path in files}
        try:
            return [self._finish(path, future) for path, future in futures.items()]
        except BaseException:  # Ctrl-C above all: the daemon cancels a request whose connection is cut
            self.stop.set()
            self.client.abort()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _transcribe(self, path: Path) -> _Answer:
        """Transcribes a file. Writes its output files, or keeps the transcript that goes to stdout."""
        with _opened(path) as file:
            transcript = self._request(path, file)
        if self.output.directory is None:
            return _Answer(transcript=transcript, warnings=transcript.warnings)
        for target in self.output.write(path, transcript):
            click.echo(f"{path} -> {target}", err=True)
        return _Answer(transcript=None, warnings=transcript.warnings)

    def _request(self, path: Path, file: BinaryIO) -> Transcript:
        from whisperd.speech.formats import from_verbose_json

        label = f"{path}: " if len(self.output.names) > 1 else ""
        on_event = self.progress.listener(str(path), label)

        def once() -> dict[str, Any]:
            if self.stop.is_set():
                raise Cancelled("the batch was interrupted")
            return self.client.transcribe(
                file, filename=path.name, fields=self.fields, on_event=on_event, translate=self.translate
            )

        return from_verbose_json(_retry(once, file, self.stop))

    def _finish(self, path: Path, future: Future[_Answer]) -> int:
        """Waits for a file and prints its transcript or its error; returns its exit code."""
        try:
            answer = future.result()
        except DaemonUnreachable:
            raise  # the other files would meet the same
        except Error as error:
            click.echo(f"whisperd: {path}: {error}", err=True)
            return exit_code(error)
        except OSError as error:
            return _report(path, error, self.output)
        if answer.transcript is not None and not self.live:
            if len(self.output.names) > 1:
                click.echo(f"==> {path} <==")
            click.echo(written(answer.transcript, self.output.formats[0], self.output.layout), nl=False)
        for warning in answer.warnings:
            click.echo(f"whisperd: {path}: warning: {warning}", err=True)
        return ExitCode.BAD_DATA if answer.warnings else 0


def _report(path: Path, error: OSError, output: Output) -> int:
    """Prints which file could not be read or written; returns the exit code."""
    if error.filename is None or Path(error.filename) == path:
        click.echo(f"whisperd: {path}: {error.strerror}", err=True)
        return ExitCode.NO_INPUT
    click.echo(f"whisperd: cannot write {output.targets(path)[0].parent}: {error.strerror}", err=True)
    return ExitCode.CANNOT_CREATE


def _retry(ask: Callable[[], dict[str, Any]], file: BinaryIO, stop: threading.Event) -> dict[str, Any]:
    """Repeats a request that a busy daemon has refused, at the time that it names, if the file can be sent again."""
    for _ in range(ATTEMPTS - 1):
        try:
            return ask()
        except RemoteError as error:
            if error.status not in PASSING or error.retry_after_s is None or not file.seekable():
                raise
            stop.wait(error.retry_after_s)
            file.seek(0)
    return ask()


def _fields(given: Mapping[str, Any]) -> dict[str, str]:
    """The fields of the HTTP request that the given options set."""
    names = ("model", "language", "prompt", "hotwords", "audio_track", "temperature", "beam_size")
    fields = {name: str(given[name]) for name in names if given[name] is not None}
    if given["word_timestamps"] or _layout(given) is not None:
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
