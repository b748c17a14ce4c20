"""The order of windows inside an engine: short requests first, and every window gets its turn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from whisperd.engine.base import DecodeRequest, Lane, Window
from whisperd.engine.cpu.batching import PASSED_OVER_BATCHES, ReadyQueue

SECOND = np.zeros(16_000, np.float32)
lanes_of_windows: st.SearchStrategy[Lane] = st.sampled_from(["interactive", "bulk"])


def window(number: int, lane: Lane = "interactive", *, temperature: float = 0.0) -> Window:
    return replace(Window(id=number, samples=SECOND, request=DecodeRequest(temperature=temperature)), lane=lane)


def ids(windows: list[Window]) -> list[int]:
    return [one.id for one in windows]


def test_interactive_first() -> None:
    """A short request does not wait behind a long one that came first."""
    lanes = ReadyQueue()
    lanes.add([window(1, "bulk"), window(2, "bulk"), window(3)])
    assert ids(lanes.take(2, 4)) == [3]
    assert ids(lanes.take(1, 4)) == [1, 2]


def test_late_windows_join() -> None:
    """A batch that is being encoded takes in compatible windows of its own lane only, up to its limit."""
    lanes = ReadyQueue()
    lanes.add([window(1, temperature=0.2), window(2, "bulk"), *map(window, range(3, 8))])
    assert ids(lanes.join(window(0), 3)) == [3, 4, 5]
    assert ids(lanes.join(window(0), 0)) == []
    assert ids(lanes.join(window(0), 9)) == [6, 7]
    assert ids(lanes.take(1, 4)) == [1]


def test_a_long_request_does_not_grow_before_a_short_one() -> None:
    """While an interactive window waits for a worker, batches of bulk windows stay as they are."""
    lanes = ReadyQueue()
    lanes.add([window(1, "bulk"), window(2)])
    assert lanes.join(window(0, "bulk"), 4) == []
    assert ids(lanes.take(1, 4)) == [2]
    assert ids(lanes.join(window(0, "bulk"), 4)) == [1]


def test_short_requests_cut_in() -> None:
    """Between two windows of a long request a worker decodes short ones of a kind, unless another one has time."""
    lanes = ReadyQueue()
    lanes.add([window(1, "bulk"), window(2), window(3, temperature=0.2), window(4)])
    assert lanes.cut_in(1, 4) == []
    assert ids(lanes.cut_in(0, 4)) == [2, 4]
    assert ids(lanes.cut_in(0, 4)) == [3]
    assert lanes.cut_in(0, 4) == []
    assert ids(lanes.open) == [1]


def test_no_request_starves() -> None:
    """Beside an endless stream of short requests, a long one gets its turn after a few batches."""
    lanes = ReadyQueue()
    lanes.add([window(0, "bulk")])
    for number in range(1, 100):
        lanes.add([window(number)])
        if ids(lanes.take(1, 4)) == [0]:
            assert number == PASSED_OVER_BATCHES + 1
            return
    raise AssertionError("it never had its turn")


def test_a_batch_is_of_one_kind() -> None:
    """Only windows with the same options share a batch, and idle workers share what is there."""
    lanes = ReadyQueue()
    lanes.add([window(1), window(2, temperature=0.2), window(3), window(4)])
    assert ids(lanes.take(2, 4)) == [1, 3]
    assert ids(lanes.take(1, 4)) == [2]
    assert ids(lanes.take(1, 4)) == [4]


def test_dropped_windows_are_gone() -> None:
    """A window that was taken cannot be dropped any more; a waiting one can."""
    lanes = ReadyQueue()
    lanes.add([window(1), window(2, "bulk")])
    assert ids(lanes.take(1, 1)) == [1]
    assert lanes.drop(frozenset({1, 2, 3})) == frozenset({2})
    assert lanes.open == []


@given(st.lists(lanes_of_windows, max_size=20), st.integers(1, 4), st.integers(1, 5))
def test_every_window_is_taken_once(found: list[Lane], n_workers: int, limit: int) -> None:
    """Every waiting window is taken exactly once, in batches within the limit."""
    lanes = ReadyQueue()
    lanes.add([window(number, lane) for number, lane in enumerate(found)])
    taken: list[int] = []
    while lanes.open:
        batch = lanes.take(n_workers, limit)
        assert 0 < len(batch) <= limit
        taken += ids(batch)
    assert sorted(taken) == list(range(len(found)))
