"""What a stretch of work costs: time, CPU time of this process or of others, energy and memory of the GPU."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

POWER_EVERY_S = 0.5
CPU_TIMES = slice(11, 15)  # of /proc/PID/stat behind the name: user, system, and those of children that have ended
PARENT = 1


@dataclass(slots=True, kw_only=True)
class Spent:
    """Filled when the stretch is over; ``joules`` None where nobody could tell."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    joules: float | None = None


class Meter:
    """``with Meter() as spent``; ``pid`` 0 is this process, another one counts with all that it has started."""

    def __init__(self, device: str, pid: int = 0) -> None:
        self._pid = pid
        self._power = _Power() if device == "cuda" and shutil.which("nvidia-smi") else None
        self._spent = Spent()

    def __enter__(self) -> Spent:
        if self._power is not None:
            self._power.start()
        self._cpu_s, self._started_s = self._cpu_now_s(), time.perf_counter()
        return self._spent

    def __exit__(self, *_: object) -> None:
        self._spent.wall_s = time.perf_counter() - self._started_s
        self._spent.cpu_s = self._cpu_now_s() - self._cpu_s
        if self._power is not None:
            watts = self._power.mean_watts()
            self._spent.joules = None if watts is None else watts * self._spent.wall_s

    def _cpu_now_s(self) -> float:
        return tree_cpu_s(self._pid) if self._pid else time.process_time()


class _Power(threading.Thread):
    """Asks nvidia-smi now and then."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()
        self._watts: list[float] = []

    def run(self) -> None:
        command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "--id=0"]
        while not self._over.wait(POWER_EVERY_S):
            answer = subprocess.run(command, check=False, capture_output=True, text=True)
            try:
                self._watts.append(float(answer.stdout))
            except ValueError:
                return  # it may not say

    def mean_watts(self) -> float | None:
        self._over.set()
        self.join()
        return sum(self._watts) / len(self._watts) if self._watts else None


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and of all below it."""
    found: dict[int, tuple[int, float]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended; its parent has its times
        ticks = sum(map(int, fields[CPU_TIMES]))
        found[int(path.parent.name)] = int(fields[PARENT]), ticks / os.sysconf("SC_CLK_TCK")
    mine = {pid}
    while more := {child for child, (parent, _) in found.items() if parent in mine} - mine:
        mine |= more
    return sum(found[one][1] for one in mine if one in found)


def peak_bytes(device: str) -> int:
    """The most memory that this process held at any time: of the GPU, else of the host."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
