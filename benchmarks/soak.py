"""Mixed load on one real daemon for a given time; fails when memory grows or anything is left over.

    pip install -e '.[embedded]'
    python -m benchmarks.soak CLIP LONG [--minutes 60] [--clients 6]

Each client picks by chance what ``chaos_clients.py`` lists: files in all ways, clients that leave, bad input, bad
HTTP, idle connections, reloads, a configuration that is broken and healed. Every kind is done once beforehand, alone;
what the quiet daemon then looks like is held against what it looks like at the end. In between, memory is sampled from
/proc every few seconds, and a line is laid through the samples after the warm-up by least squares. It exits with 1 when
memory grows faster than ``--mib-per-hour`` and than chance explains, when descriptors, threads, requests or spool files
are left over, when anything had an outcome that it may not have, or when the daemon does not stop with 0. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.chaos_clients import PATIENCE_S, Action, Clients
from benchmarks.systems import Whisperd, running
from benchmarks.vitals import MIB, Limits, Sample, Trend, complaints, take, trend
from whisperd.client import Client

SAMPLE_EVERY_S = 5.0
PRINT_EVERY = 12  # samples
SETTLE_S = 2.0


class Load:
    """Clients that perform actions until the end, and the outcomes."""

    def __init__(self, actions: Sequence[Action]) -> None:
        self._actions = actions
        self._weights = [action.weight for action in actions]
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.unexpected: Counter[str] = Counter()
        self.over = threading.Event()

    def run(self, seed: int) -> None:
        """The loop of one client."""
        chance = random.Random(seed)
        while not self.over.is_set():
            (action,) = chance.choices(self._actions, self._weights)
            self.do(action)

    def do(self, action: Action) -> None:
        """Performs one action and counts its outcome."""
        outcome = action.outcome()
        with self._lock:
            self.outcomes[f"{action.name}: {outcome}"] += 1
            if outcome not in action.allowed:
                self.unexpected[f"{action.name}: {outcome}"] += 1

    def everything_once(self) -> None:
        """Performs each action alone."""
        for action in self._actions:
            self.do(action)


@dataclass(frozen=True, slots=True, kw_only=True)
class Soaked:
    """Samples of the daemon: quiet, under load after the warm-up, and quiet again."""

    before: Sample
    under_load: Sequence[Sample]
    after: Sample


class Watch:
    """Takes samples of one daemon."""

    def __init__(self, pid: int, client: Client) -> None:
        self._pid = pid
        self._client = client
        self._started_s = time.monotonic()

    def sample(self) -> Sample:
        """Takes a sample now."""
        return take(self._pid, self._client.status()["requests"], time.monotonic() - self._started_s)

    def quiet(self) -> Sample:
        """Samples the daemon some time after it has become inactive."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self.sample().n_active and time.monotonic() < deadline_s:
            time.sleep(0.1)
        time.sleep(SETTLE_S)
        return self.sample()

    def watched(self, duration_s: float) -> list[Sample]:
        """Takes samples for a time."""
        found: list[Sample] = []
        end_s = time.monotonic() + duration_s
        while (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(SAMPLE_EVERY_S, left_s))
            found.append(self.sample())
            if len(found) % PRINT_EVERY == 1:
                print(f"{left_s:5.0f} s left: {found[-1]}", flush=True)
        return found


def soak(watch: Watch, load: Load, *, n_clients: int, duration_s: float, warm_up_s: float) -> Soaked:
    """Runs every action once, then measures the quiet daemon, the load, and the quiet daemon again."""
    load.everything_once()
    before = watch.quiet()
    print(f"quiet: {before}", flush=True)
    threads = [threading.Thread(target=load.run, args=(seed,)) for seed in range(n_clients)]
    for thread in threads:
        thread.start()
    try:
        watch.watched(warm_up_s)
        under_load = watch.watched(duration_s - warm_up_s)
    finally:
        load.over.set()
        for thread in threads:
            thread.join()
    after = watch.quiet()
    print(f"quiet: {after}", flush=True)
    return Soaked(before=before, under_load=under_load, after=after)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clip", type=Path)
    parser.add_argument("long", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--warm-up-minutes", type=float, default=10.0, help="at most a quarter of all")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--mib-per-hour", type=float, default=20.0)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 when something is wrong."""
    options = parse(words)
    duration_s = 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="whisperd-soak-") as name:
        daemon = Whisperd(Path(name))
        with running(daemon, options.clip) as process:
            clients = Clients(daemon.socket, process.pid, daemon.config, options.clip, options.long)
            load = Load(clients.actions())
            found = soak(
                Watch(process.pid, daemon.client),
                load,
                n_clients=options.clients,
                duration_s=duration_s,
                warm_up_s=min(60 * options.warm_up_minutes, duration_s / 4),
            )
            left = [*leftovers(daemon, process)]
    limits = Limits(mib_per_hour=options.mib_per_hour, n_clients=options.clients)
    grows = trend(found.under_load)
    wrong = [*complaints(grows, found.before, found.after, limits), *left]
    wrong += [f"unexpected, {count} times: {outcome}" for outcome, count in load.unexpected.items()]
    report(found, grows, load, wrong)
    return 1 if wrong else 0


def leftovers(daemon: Whisperd, process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Problems on disk and with the end of the process."""
    spooled = [path.name for path in daemon.spool.iterdir()]
    if spooled:
        yield f"left in the spool: {', '.join(spooled)}"
    process.send_signal(signal.SIGTERM)
    if (exit_code := process.wait(PATIENCE_S)) != 0:
        yield f"the daemon ended with {exit_code}"


def report(found: Soaked, grows: Trend, load: Load, wrong: Sequence[str]) -> None:
    """Prints the outcomes, a line for people, and one as JSON."""
    for outcome, count in sorted(load.outcomes.items()):
        print(f"  {count:6d} {outcome}")
    own_mib = [sample.own_bytes / MIB for sample in found.under_load]
    print(
        f"memory of its own under load: {min(own_mib):.0f} to {max(own_mib):.0f} MiB, {grows.mib_per_hour:+.1f} MiB an "
        f"hour (standard error {grows.error:.1f}) over {len(own_mib)} samples; quiet, before and after: descriptors "
        f"{found.before.n_descriptors}, {found.after.n_descriptors}, threads {found.before.n_threads}, "
        f"{found.after.n_threads}"
    )
    print("\n".join(["WRONG:", *wrong] if wrong else ["nothing is wrong"]))
    whole = {
        "ok": not wrong,
        "wrong": list(wrong),
        "trend": {key: None if math.isnan(value) else value for key, value in asdict(grows).items()},
        "own_mib_under_load": {"min": min(own_mib), "max": max(own_mib), "samples": len(own_mib)},
        "before": asdict(found.before),
        "after": asdict(found.after),
        "outcomes": dict(load.outcomes),
    }
    print(json.dumps(whole))


if __name__ == "__main__":
    sys.exit(main())
