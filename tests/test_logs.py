"""Records in the journal: one entry for a record, its fields, its priority; lines where there is no journal."""

from __future__ import annotations

import io
import logging
import socket
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.logs import JournalFormatter, JournalHandler, entry


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "journal"))
        listener.settimeout(10)
        yield listener


def parsed(datagram: bytes) -> dict[str, str]:
    """Fields of an entry, read as journald reads them."""
    fields = {}
    while datagram:
        line, _, datagram = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", datagram[:8])
            value, datagram = datagram[8 : 8 + length], datagram[8 + length + 1 :]
        fields[name.decode()] = value.decode()
    return fields


def record(message: str, level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("whisperd.x", level, "x.py", 1, message, None, None)
    made.__dict__["fields"] = fields
    return made


def test_a_record_is_one_entry(journal: socket.socket) -> None:
    """Message, priority and fields of its own arrive together."""
    with closing(JournalHandler(logging.NullHandler(), Path(journal.getsockname()))) as handler:
        handler.handle(record("two\nlines", logging.ERROR, WHISPERD_MODEL="tiny", WHISPERD_STATUS=200))
    assert parsed(journal.recv(65536)) == {
        "MESSAGE": "two\nlines",
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "whisperd",
        "WHISPERD_LOGGER": "whisperd.x",
        "WHISPERD_MODEL": "tiny",
        "WHISPERD_STATUS": "200",
    }


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_no_text_adds_a_field(text: str) -> None:
    """No text in a message or a field can add another field."""
    fields = parsed(entry(record("m", WHISPERD_MODEL=text), text))
    assert (fields["MESSAGE"], fields["WHISPERD_MODEL"], len(fields)) == (text, text, 5)


def test_without_a_journal_it_is_lines(tmp_path: Path) -> None:
    """A record that the journal does not accept goes to stderr, each line with its priority."""
    stream = io.StringIO()
    fallback = logging.StreamHandler(stream)
    fallback.setFormatter(JournalFormatter("%(message)s"))
    with closing(JournalHandler(fallback, tmp_path / "nobody")) as handler:
        handler.handle(record("two\nlines", logging.WARNING))
    assert stream.getvalue() == "<4>two\n<4>lines\n"
