"""Bytes, rate and time left."""

from __future__ import annotations

from whisperd.store.progress import Amount, Progress, Tracker, clock_text


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_what_was_there_before_is_no_speed() -> None:
    """A resumed download starts at its bytes without a rate; then the rate is that of the last seconds."""
    told: list[Progress] = []
    clock = Clock()
    tracker = Tracker({"a": 1000, "b": 3000}, told.append, clock)
    tracker.at("a", 400)
    assert told[-1].model == Amount(done_bytes=400, total_bytes=1000)
    assert told[-1].model.left_s is None
    clock.now_s = 2.0
    tracker.at("a", 600)
    amount = told[-1].model
    assert (amount.bytes_per_s, amount.left_s) == (100.0, 4.0)
    assert told[-1].run == Amount(done_bytes=600, total_bytes=4000, bytes_per_s=100.0)
    tracker.at("b", 0)
    clock.now_s = 4.0
    tracker.at("b", 1000)
    assert told[-1].model.bytes_per_s == 500.0
    assert told[-1].run.done_bytes == 1600
    assert told[-1].run.bytes_per_s == 300.0


def test_not_too_often() -> None:
    """Progress is reported a few times a second, and the end always."""
    told: list[Progress] = []
    clock = Clock()
    tracker = Tracker({"a": 1000}, told.append, clock)
    for n_bytes in range(0, 1001, 10):
        clock.now_s += 0.01
        tracker.at("a", n_bytes)
    assert len(told) < 10
    assert told[-1].model.done_bytes == 1000


def test_a_link_that_becomes_slow() -> None:
    """The rate follows the link within seconds."""
    told: list[Progress] = []
    clock = Clock()
    tracker = Tracker({"a": 10**9}, told.append, clock)
    n_bytes = 0
    for rate in [10_000_000] * 30 + [1000] * 30:
        clock.now_s += 1.0
        n_bytes += rate
        tracker.at("a", n_bytes)
    assert told[29].model.bytes_per_s == 10_000_000
    assert told[-1].model.bytes_per_s == 1000


def test_words() -> None:
    """Progress is one line of text, with all models where there are several."""
    some = Amount(done_bytes=450_000_000, total_bytes=10**9, bytes_per_s=10_000_000)
    assert some.text() == "45 % of 1.0 GB, 10.0 MB/s, 0:55 left"
    assert Amount(done_bytes=0, total_bytes=0).text() == "100 % of 0 B"
    one = Progress(name="o/n", model=some, run=some)
    assert one.text() == "downloading o/n: 45 % of 1.0 GB, 10.0 MB/s, 0:55 left"
    assert Progress(name="o/n", model=some, run=some, n_models=2).text().endswith("; all 2 models: " + some.text())
    assert [clock_text(duration_s) for duration_s in (0, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]
