"""The command line. Home of click. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import os
import sys

import click

from whisperd.cli.config import config
from whisperd.cli.demo import demo
from whisperd.cli.options import complain, exit_code
from whisperd.cli.reconcile import reconcile
from whisperd.cli.serve import serve
from whisperd.cli.status import models, reload, status
from whisperd.cli.transcribe import transcribe
from whisperd.errors import Cancelled, Error
from whisperd.version import VERSION

EXIT_CODES = """\b
Exit codes:
  0 done           1 something failed     2 wrong usage        3 changes pending
  4 Hub not asked  65 undecodable audio   66 no such input     69 no daemon answers
  70 engine error  73 cannot write        75 try again later   77 no permission
  78 wrong configuration                  130 interrupted
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES)
@click.version_option(VERSION, prog_name="whisperd")
def cli() -> None:
    """Speech models declared in one file, kept true on disk, and served in batches from one socket."""


for command in (serve, reconcile, config, transcribe, status, models, reload, demo):
    cli.add_command(command)


def main() -> None:
    """Runs the command line and exits; the one place where an error becomes an exit code."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except Error as error:
        complain(f"whisperd: {error}")
        code = exit_code(error)
    except (KeyboardInterrupt, click.Abort):
        code = Cancelled.exit_code
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code or 0)
