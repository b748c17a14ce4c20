"""Standard streams that fail in a documented way when they are closed or full, or when their reader has gone."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

import click

from whisperd.errors import OutputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDIN, STDOUT, STDERR = range(3)


class Output(io.FileIO):
    """Standard output. The first write that fails raises OutputError, or ends the command where the reader has gone."""

    has_failed = False

    def write(self, data: ReadableBuffer) -> int:
        """Writes; after a failure everything else is dropped, as the interpreter writes what is left when it ends."""
        if self.has_failed:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except BrokenPipeError as error:  # the reader has seen enough, as `head` does
            self.has_failed = True
            raise click.exceptions.Exit(0) from error
        except OSError as error:
            self.has_failed = True
            raise OutputError(f"cannot write to stdout: {error.strerror}") from error


class Messages(io.FileIO):
    """Standard error. What cannot be written is dropped: a message must not stop the work that it is about."""

    def write(self, data: ReadableBuffer) -> int:
        """Writes, or drops."""
        with suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes


def protect_streams() -> None:
    """Puts these in place of ``sys.stdout`` and ``sys.stderr``, and opens what the caller has closed.

    A closed stream would otherwise give its number to the next file that is opened, a lock or a blob, which would then
    be written to. Standard output is opened in a way that fails: what it should have shown is lost.
    """
    for number, flags in ((STDIN, os.O_RDONLY), (STDOUT, os.O_RDONLY), (STDERR, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)
    sys.stdout = _text(Output(STDOUT, "w", closefd=False), sys.stdout)
    sys.stderr = _text(Messages(STDERR, "w", closefd=False), sys.stderr, errors="backslashreplace")


def flush_output() -> None:
    """Writes what is still buffered; raises OutputError."""
    with suppress(click.exceptions.Exit):
        sys.stdout.flush()


def _text(raw: io.FileIO, before: TextIO | None, errors: str | None = None) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before else "utf-8",
        errors=errors or (before.errors if before else "strict"),
        line_buffering=True,
    )
