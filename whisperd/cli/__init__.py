"""The command line. Home of click. Each command imports what is heavy when it runs."""

from __future__ import annotations

import sys

import click

from whisperd.cli.config import config
from whisperd.cli.demo import demo
from whisperd.cli.download import download
from whisperd.cli.options import complain, exit_code
from whisperd.cli.reconcile import reconcile
from whisperd.cli.serve import serve
from whisperd.cli.status import models, reload, status
from whisperd.cli.streams import flush_output, protect_streams
from whisperd.cli.transcribe import transcribe
from whisperd.errors import Cancelled, Error, ExitCode, OutputError
from whisperd.version import VERSION

EXIT_CODES = """\b
Exit codes:
  0 done           1 something failed     2 wrong usage        3 changes pending
  4 Hub not asked  65 undecodable audio   66 no such input     69 no daemon answers
  70 engine error  73 cannot write files  74 cannot write output
  75 try again later  77 no permission  78 wrong configuration  130 interrupted
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(VERSION, prog_name="whisperd")
def cli() -> None:
    """Speech models declared in one file, kept true on disk, and served in batches from one socket."""


for command in (serve, reconcile, download, config, transcribe, status, models, reload, demo):
    cli.add_command(command)


def main() -> None:
    """Runs the command line and exits; the one place where an error becomes an exit code."""
    protect_streams()
    code = _run()
    try:
        flush_output()
    except OutputError as error:
        code = _explain(error)
    sys.exit(code)


def _run() -> int:
    try:
        code = cli.main(standalone_mode=False)
    except SystemExit as done:
        code = done.code
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except Error as error:
        code = _explain(error)
    except (KeyboardInterrupt, click.Abort):
        code = Cancelled.exit_code
    return int(code or ExitCode.DONE)


def _explain(error: Error) -> int:
    """Says on stderr what is wrong; returns the exit code."""
    complain(f"whisperd: {error}")
    return exit_code(error)
