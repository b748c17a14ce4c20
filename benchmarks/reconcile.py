"""Wall time and requests of a reconcile beside huggingface_hub's own download, from one Hub on the loopback interface.

    pip install -e '.[test]'
    python -m benchmarks.reconcile [--models 20] [--rounds 5] [--megabytes 64]

``warm``: every model is complete. ``cold``: none is there. ``again``: a large file whose download was killed at nine
tenths is fetched again; the bytes are those that the Hub has sent the second time. Each command is a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.loopback_hub import LoopbackHub, serving, whisper_files

PLAIN = (
    "import sys; from huggingface_hub import snapshot_download\n"
    "for name in sys.argv[3:]: snapshot_download(name, cache_dir=sys.argv[1], endpoint=sys.argv[2])"
)
POLL_S = 0.002
LIMIT_S = 60.0


class Bench:
    """A Hub with models, and the two programs under comparison.

    Args:
        hub: the Hub that has the models.
        directory: where caches are made.
        names: the names of the models.
    """

    def __init__(self, hub: LoopbackHub, directory: Path, names: Sequence[str]) -> None:
        self._hub = hub
        self._directory = directory
        self._names = names
        config = f"models = {json.dumps(list(names))}\n[reconcile]\nendpoint = {json.dumps(hub.endpoint)}\n"
        (directory / "whisperd.toml").write_text(config, encoding="utf-8")

    def commands(self, cache: Path) -> dict[str, list[str]]:
        """The commands of both programs, on the same models, each with a cache of its own."""
        config = str(self._directory / "whisperd.toml")
        return {
            "whisperd reconcile": [
                sys.executable, "-m", "whisperd", "reconcile", "-c", config, "--cache-dir", str(cache / "whisperd"),
            ],
            "snapshot_download": [
                sys.executable, "-c", PLAIN, str(cache / "plain"), self._hub.endpoint, *self._names,
            ],
        }  # fmt: skip

    def timed(self, command: Sequence[str]) -> tuple[float, int]:
        """Runs a command; returns its seconds and the number of its requests."""
        self._hub.requests.clear()
        started_s = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=_environ(self._directory))
        return time.perf_counter() - started_s, len(self._hub.requests)

    def killed(self, command: Sequence[str], at_bytes: int) -> int:
        """Starts a command, kills it at a number of sent bytes, and runs it again; returns all bytes sent."""
        self._hub.sent_bytes = 0
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environ(self._directory)
        ) as process:
            deadline_s = time.monotonic() + LIMIT_S
            while self._hub.sent_bytes < at_bytes and time.monotonic() < deadline_s:
                time.sleep(POLL_S)
            process.send_signal(signal.SIGKILL)
        self._hub.sent_bytes = 0
        self.timed(command)
        return self._hub.sent_bytes


def _environ(home: Path) -> dict[str, str]:
    return {**os.environ, "HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}


def in_rounds(bench: Bench, directory: Path, rounds: int, prepare: Callable[[Path], None]) -> dict[str, list[float]]:
    """Runs both programs in turn, ``rounds`` times."""
    walls: dict[str, list[float]] = {}
    for number in range(rounds):
        cache = directory / f"cache{number}"
        for name, command in bench.commands(cache).items():
            prepare(cache)
            walls.setdefault(name, []).append(bench.timed(command)[0])
    return walls


def show(title: str, walls: dict[str, list[float]]) -> None:
    """Prints a row for each program, with its ratio to the last one."""
    base_s = statistics.median(list(walls.values())[-1])
    for name, all_s in walls.items():
        middle_s = statistics.median(all_s)
        spread = f"{min(all_s):.2f} to {max(all_s):.2f}"
        print(f"{title:6} {name:20} {middle_s:6.2f} s ({spread})  {middle_s / base_s:5.2f} of the other")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=64)
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="whisperd-bench-"))
    names = [f"org/model{number}" for number in range(arguments.models)]
    try:
        with serving() as hub:
            for seed, name in enumerate(names):
                hub.add(name, whisper_files(seed))
            bench = Bench(hub, directory, names)
            show("cold", in_rounds(bench, directory, arguments.rounds, lambda _: None))
            show("warm", in_rounds(bench, directory, arguments.rounds, lambda _: None))
            for name, command in bench.commands(directory / "cache0").items():
                print(f"warm   {name:20} {bench.timed(command)[1]} requests for {len(names)} models")
            large = arguments.megabytes * 10**6
            hub.add("org/large", whisper_files(99, size_bytes=large))
            hub.fault("GET /cdn/", rate_bytes_per_s=large / 4)
            one = Bench(hub, directory, ["org/large"])
            for name, command in one.commands(directory / "again").items():
                sent = one.killed(command, round(0.9 * large))
                print(f"again  {name:20} {100 * sent / large:5.1f} % of {arguments.megabytes} MB sent a second time")
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
