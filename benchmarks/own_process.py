"""The cost of ``engine.own_process`` on the CPU: start, idle memory, CPU time of a file, transfer of windows.

    pip install -e '.[embedded]'
    python -m benchmarks.own_process FILE [--rounds 3]

Both settings are measured in turn, each with a daemon of its own. Memory is the proportional set size of all its
processes, CPU time is theirs together. On a machine that does other things only the CPU times mean something.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.systems import Whisperd, started
from whisperd.client import Client
from whisperd.engine.process.messages import MessageSocket
from whisperd.speech.units import WINDOW_SAMPLES

WINDOWS = 200
TICKS_PER_S = 100


def cpu_s(pids: Sequence[int]) -> float:
    """User and system time of the processes so far."""
    fields = [Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split() for pid in pids]
    return sum(int(one[11]) + int(one[12]) for one in fields) / TICKS_PER_S


def memory_mb(pids: Sequence[int]) -> float:
    """Proportional set size of the processes."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii") for pid in pids]
    return sum(int(text.partition("\nPss:")[2].split()[0]) for text in texts) / 1024


def processes(client: Client) -> list[int]:
    """The pids of the daemon and of its engine's process, if there is one."""
    status = client.status()
    return [pid for pid in (status["pid"], status["models"][0]["engine_pid"]) if pid]


def measure(path: Path, *, own_process: bool) -> str:
    """Measures one daemon; returns a line."""
    begun_s = time.perf_counter()
    options = f"own_process = {str(own_process).lower()}"
    with tempfile.TemporaryDirectory() as directory:
        daemon = Whisperd(Path(directory), options=options)
        with started(daemon):
            while not daemon.ready():
                time.sleep(0.1)
            ready_s = time.perf_counter() - begun_s
            pids = processes(daemon.client)
            boot_s, idle_mb = cpu_s(pids), memory_mb(pids)
            asked_s = time.perf_counter()
            n_windows = daemon.ask(path).n_windows
            wall_s = time.perf_counter() - asked_s
            file_s, after_mb = cpu_s(pids) - boot_s, memory_mb(pids)
    return (
        f"own_process={own_process!s:5} ready in {ready_s:5.2f} s ({boot_s:.2f} s of CPU), idle {idle_mb:4.0f} MB; "
        f"file: {file_s:6.2f} s of CPU, {wall_s:6.2f} s, {n_windows} windows, {after_mb:4.0f} MB after it"
    )


def crossing() -> str:
    """Measures how many windows pass a socket pair between two processes."""
    ours, theirs = socket.socketpair()
    if not os.fork():
        ours.close()
        wire = MessageSocket(theirs)
        while wire.receive() is not None:
            pass
        os._exit(0)
    theirs.close()
    samples = np.zeros(WINDOW_SAMPLES, np.float32)
    wire, begun_s, before_s = MessageSocket(ours), time.perf_counter(), time.process_time()
    for number in range(WINDOWS):
        wire.send("admit", (number, samples))
    spent_s = time.process_time() - before_s
    wire.close()
    os.wait()
    wall_s = time.perf_counter() - begun_s
    moved_mb = WINDOWS * samples.nbytes / 1e6
    return f"windows cross at {moved_mb / wall_s:.0f} MB/s; sending one takes {1e3 * spent_s / WINDOWS:.2f} ms of CPU"


def main() -> int:
    """Prints a line for each round."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for _ in range(arguments.rounds):
        print(crossing())
        for own_process in (False, True):
            print(measure(arguments.file, own_process=own_process), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
