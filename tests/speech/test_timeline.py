"""Sound is placed where the timestamps say, and what is missing of a file is counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.speech.timeline import MISSING_S, OVERLAP_S, TOLERANCE_S, Completeness, Timeline


@pytest.mark.parametrize(
    ("position_s", "stamp_s", "hole_s"),
    [
        (5.0, None, 0.0),
        (5.0, 5.0 + TOLERANCE_S / 2, 0.0),
        (5.0, 5.0 - TOLERANCE_S / 2, 0.0),
        (0.0, 10.0, 10.0),
        (5.0, 25.0, 20.0),
        (5.0, 95.0, 0.0),  # behind the end of the file
        (5.0, 4.0, 0.0),
    ],
)
def test_hole(position_s: float, stamp_s: float | None, hole_s: float) -> None:
    """Silence fills gaps in the timestamps inside the file; overlaps and impossible times leave the sound unchanged."""
    assert Timeline(60.0).hole_s(position_s, stamp_s) == hole_s


def test_overlap_is_paid_back() -> None:
    """Timestamps that lag behind the sound shorten the next gap, so that times return to those of the file."""
    timeline = Timeline(60.0)
    assert timeline.hole_s(10.0, 8.0) == 0.0
    assert timeline.hole_s(12.0, 15.0) == 3.0


@pytest.mark.parametrize("stamp_s", [0.0, 30.0 - OVERLAP_S - 1.0])
def test_clock_that_begins_again(stamp_s: float) -> None:
    """A clock that jumps back, as in joined recordings, continues from the sound; gaps behind it are kept."""
    timeline = Timeline(100.0, joins=True)
    assert timeline.hole_s(30.0, stamp_s) == 0.0
    assert timeline.hole_s(31.0, stamp_s + 1.0) == 0.0
    assert timeline.hole_s(31.0, stamp_s + 6.0) == pytest.approx(5.0)


def test_jump() -> None:
    """In joined recordings a jump of hours is another clock and not a gap."""
    timeline = Timeline(100_000.0, joins=True)
    assert timeline.hole_s(30.0, 26.5 * 3600) == 0.0
    assert timeline.hole_s(31.0, 26.5 * 3600 + 1.0) == pytest.approx(0.0)


def test_bare_streams_have_holes_only_behind_damage() -> None:
    """In a bare stream timestamps are counted, so that only a lost packet makes a gap, of any length."""
    timeline = Timeline(60.0, is_bare=True)
    assert timeline.hole_s(5.0, 5.5) == 0.0
    assert timeline.hole_s(6.0, 6.526, damaged=True) == pytest.approx(0.026)


def test_restart() -> None:
    """A file inside the file is timed from its own beginning."""
    timeline = Timeline(None)
    timeline.restart(12.0)
    assert timeline.hole_s(12.0, 0.0) == 0.0
    assert timeline.hole_s(12.0, 2.0) == 2.0


@given(st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(-20, 40)), max_size=30))
def test_sound_never_moves_back(frames: list[tuple[float, float]]) -> None:
    """Whatever the timestamps are, no gap is negative or longer than the file."""
    timeline, position_s, stamp_s = Timeline(60.0), 0.0, 0.0
    for length_s, jump_s in frames:
        stamp_s += length_s + jump_s
        hole_s = timeline.hole_s(position_s, stamp_s)
        assert 0.0 <= hole_s <= 60.0
        position_s += hole_s + length_s


def test_whole_file() -> None:
    """A file that was decoded whole gets no warning, and neither does one that only estimates its length."""
    assert not Completeness(end_s=59.5, claimed_s=60.0).warnings
    assert not Completeness(end_s=20.0, claimed_s=None).warnings
    assert not Completeness(end_s=60.0, claimed_s=60.0, holes_s=20.0, n_holes=1).warnings  # a recorder paused


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (Completeness(end_s=30.0, claimed_s=60.0), "ends at 30.0 s, but the file claims 60.0 s"),
        (Completeness(end_s=60.0, claimed_s=60.0, lost_s=9.0, n_damaged=7), "7 damaged packets with 9.0 s"),
        (Completeness(end_s=60.0, claimed_s=None, lost_s=2.0, silence_s=2.0, n_damaged=1), "2.0 s of silence"),
        (Completeness(end_s=60.0, claimed_s=60.0, holes_s=30.0, n_holes=30), "30.0 s of audio in 30 gaps"),
    ],
)
def test_partial_file(found: Completeness, says: str) -> None:
    """A warning says how much audio is missing."""
    assert says in found.warnings[0]
    assert not found.is_mostly_missing


@pytest.mark.parametrize(
    "found",
    [
        Completeness(end_s=19.0, claimed_s=60.0),
        Completeness(end_s=60.0, claimed_s=60.0, silence_s=41.0, lost_s=41.0, n_damaged=100),
        Completeness(end_s=2.0, claimed_s=None, lost_s=5.0, n_damaged=50),
    ],
)
def test_remains_of_a_file(found: Completeness) -> None:
    """A file of which more than two thirds are missing is refused, since an answer would mislead."""
    assert found.is_mostly_missing
    assert found.missing_s > MISSING_S


@given(st.floats(0, 100), st.floats(0, 100) | st.none())
def test_sound_in_place_has_no_hole(position_s: float, stamp_s: float | None) -> None:
    """A position that is in place needs no silence, and one that needs silence is not in place."""
    timeline = Timeline(None)
    in_place = timeline.is_in_place(position_s, stamp_s)
    assert in_place == (stamp_s is None or abs(stamp_s - position_s) <= TOLERANCE_S)
    assert not in_place or timeline.hole_s(position_s, stamp_s) == 0.0
