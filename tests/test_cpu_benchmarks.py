"""The benchmarks of fairness and endurance work, end in time, and detect what they measure."""

from __future__ import annotations

import argparse
import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import fairness, soak
from benchmarks.chaos_clients import Action
from benchmarks.systems import Answer, NoAnswer, answer
from benchmarks.vitals import HOUR_S, MIB, Limits, Sample, Trend, complaints, trend
from tests.support.speech import Clip

QUIET = Sample(
    at_s=0.0,
    rss_bytes=400 * MIB,
    own_bytes=300 * MIB,
    n_descriptors=9,
    n_threads=14,
    n_active=0,
    n_done=0,
    n_failed=0,
)
LIMITS = Limits(mib_per_hour=20.0, n_clients=6)
STUCK_SERVER = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
with server.accept()[0] as first:
    first.sendall(b"the first one is served")
kept = []
while True:
    kept.append(server.accept()[0])
"""


class Stuck:
    """A server that answers once and never again."""

    name = "stuck"

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port: int = free.getsockname()[1]

    def command(self) -> Sequence[str | Path]:
        return [sys.executable, "-c", STUCK_SERVER, str(self._port)]

    def ask(self, _path: Path) -> Answer:
        with socket.create_connection(("127.0.0.1", self._port)) as connection:
            return answer(connection.recv(100).decode(), 1)

    def status(self) -> None:
        socket.create_connection(("127.0.0.1", self._port)).close()


def test_fairness(clips: dict[str, Clip], capsys: pytest.CaptureFixture[str]) -> None:
    """A real daemon completes all three runs: every clip and the file come back, as the table and the JSON show."""
    clip, long = str(clips["monkeys"].path), str(clips["agent"].path)
    fairness.main([clip, long, "--hours", "0", "--idle-s", "2", "--limit-s", "120"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].startswith("whisperd ")
    found = json.loads(printed[-1])["whisperd"]
    assert found["clips alone"]["clips"] == 2
    assert found["clips alone"]["clips_lost"] == found["both"]["clips_lost"] == 0
    assert 0 < found["both"]["p50_s"] <= found["both"]["p99_s"] <= found["both"]["max_s"]
    assert found["file alone"]["file_words"] == found["both"]["file_words"] > 3
    assert found["both"]["windows_per_s"] > 0
    assert found["both"]["status_p99_s"] > 0


def test_a_server_that_is_stuck(clips: dict[str, Clip], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run ends at its limit, and missing answers are counted and not taken for fast."""
    options = argparse.Namespace(
        clip=clips["monkeys"].path, long=clips["monkeys"].path, hours=0.0, idle_s=1.0, rounds=1, limit_s=1.8
    )
    fairness.compare([Stuck()], tmp_path, options)
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])["stuck"]
    assert found["both"]["clips_lost"] == found["both"]["clips"] >= 2
    assert found["both"]["p50_s"] is None
    assert found["both"]["file_s"] is None
    assert found["both"]["windows_per_s"] == 0
    assert "did not come back within 2 s" in printed


def test_latency_counts_from_the_schedule(clips: dict[str, Clip], tmp_path: Path) -> None:
    """The latency of a clip that was sent late includes the wait, whatever the cause."""
    stuck = Stuck()
    fairness.make_long(clips["monkeys"].path, tmp_path / "clip.wav", 0.0)
    with subprocess.Popen(list(stuck.command())) as process:
        while (reply := fairness.ask(stuck, tmp_path / "clip.wav", time.perf_counter() - 5.0)).trouble:
            assert process.poll() is None
        process.kill()
    assert reply.latency_s > 5.0


def test_silence_is_no_answer() -> None:
    """An answer at once without text does not count as an answer."""
    with pytest.raises(NoAnswer):
        answer(" \n", 1)


def test_percentiles_with_losses() -> None:
    """A lost request ranks slower than every answered one."""
    latencies_s = [0.2, math.inf, 0.1, 0.3]
    assert fairness.percentile(latencies_s, 50) == 0.2
    assert math.isinf(fairness.percentile(latencies_s, 99))
    assert fairness.seconds(math.inf, 30.0) == "> 30"


def test_soak(clips: dict[str, Clip], capsys: pytest.CaptureFixture[str]) -> None:
    """A real daemon passes the soak run, and the verdict is computed."""
    path = str(clips["monkeys"].path)
    code = soak.main([path, path, "--minutes", "0.05", "--clients", "2"])
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(printed[-1])
    assert code == 0, printed
    assert found["ok"]
    assert found["outcomes"]["break_and_heal: refused, healed"] >= 1
    assert len({outcome.partition(":")[0] for outcome in found["outcomes"]}) == 20


def test_an_outcome_that_may_not_be() -> None:
    """An outcome that is not allowed is counted apart."""
    load = soak.Load([Action(do=lambda: "500", weight=1, allowed=frozenset({"done"}))])
    load.everything_once()
    assert list(load.unexpected.values()) == [1]


@given(
    start_mib=st.floats(1, 1000),
    slope=st.floats(-100, 100),
    noise=st.lists(st.floats(-20, 20), min_size=3, max_size=50),
)
def test_trend(start_mib: float, slope: float, noise: list[float]) -> None:
    """The slope of a straight line is found exactly; noise moves it, and the error grows with the noise."""
    straight = [
        replace(QUIET, at_s=hour * HOUR_S, own_bytes=round((start_mib + slope * hour) * MIB))
        for hour in range(len(noise))
    ]
    found = trend(straight)
    assert found.mib_per_hour == pytest.approx(slope, abs=1e-4)
    assert found.error == pytest.approx(0, abs=1e-4)
    noisy = [replace(one, own_bytes=one.own_bytes + round(mib * MIB)) for one, mib in zip(straight, noise, strict=True)]
    assert trend(noisy).error >= 0


def test_too_few_samples() -> None:
    """Too few samples give no trend."""
    found = trend([QUIET, QUIET])
    assert math.isnan(found.mib_per_hour)
    assert not list(complaints(found, QUIET, QUIET, LIMITS))


@pytest.mark.parametrize(
    ("found", "after", "complaint"),
    [
        (Trend(mib_per_hour=30, error=5), QUIET, "memory grows by 30.0 MiB"),
        (Trend(mib_per_hour=30, error=16), QUIET, ""),  # may be noise
        (Trend(mib_per_hour=15, error=1), QUIET, ""),  # little enough
        (Trend(mib_per_hour=0, error=1), replace(QUIET, n_descriptors=12), "12 descriptors"),
        (Trend(mib_per_hour=0, error=1), replace(QUIET, n_threads=30), "30 threads"),
        (Trend(mib_per_hour=0, error=1), replace(QUIET, n_active=1), "1 requests"),
    ],
)
def test_complaints(found: Trend, after: Sample, complaint: str) -> None:
    """Each kind of growth has its complaint, and noise has none."""
    assert [text[: len(complaint)] for text in complaints(found, QUIET, after, LIMITS)] == [complaint] * bool(complaint)
