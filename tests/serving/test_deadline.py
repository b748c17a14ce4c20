"""The earliest deadline counts, each from its own start."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.serving.http.deadline import deadline, silence_s

PYTHON = "x-stainless-read-timeout"
NODE = "x-stainless-timeout"


@pytest.mark.parametrize(
    ("timeout_s", "headers", "stream", "left_s"),
    [
        (None, {}, False, None),
        (5.0, {}, False, 5.0),
        (5.0, {}, True, 5.0),
        (None, {PYTHON: "600"}, False, 599.0),
        (None, {PYTHON: "600.0"}, True, None),
        (None, {PYTHON: "2"}, False, 1.9),
        (None, {NODE: "600"}, False, 589.0),
        (None, {NODE: "9"}, False, 0.0),
        (5.0, {PYTHON: "600"}, False, 5.0),
        (1000.0, {PYTHON: "600", NODE: "300"}, False, 289.0),
        (None, {PYTHON: "None", NODE: "inf"}, False, None),
        (None, {PYTHON: "-1", NODE: "nan"}, False, None),
    ],
)
def test_deadlines(timeout_s: float | None, headers: Mapping[str, str], stream: bool, left_s: float | None) -> None:
    """After an upload of 10 s Python's limit starts now and Node's started before; an unreadable one is ignored."""
    found = deadline(timeout_s, headers, elapsed_s=10.0, stream=stream)
    assert (found and found.left_s) == (None if left_s is None else pytest.approx(left_s))


@pytest.mark.parametrize(("hint", "expected_s"), [("600", 15.0), ("10", 5.0), ("0.1", 0.5), ("x", 15.0)])
def test_silence(hint: str, expected_s: float) -> None:
    """A stream sends something twice within its client's time limit."""
    assert silence_s({PYTHON: hint}, 15.0) == expected_s


@given(text=st.text(max_size=12), other=st.floats().map(str))
def test_any_header(text: str, other: str) -> None:
    """Whatever the headers say, a deadline is a finite time that is not negative."""
    found = deadline(None, {PYTHON: text, NODE: other}, elapsed_s=0.0, stream=False)
    assert found is None or 0 <= found.left_s < float("inf")
