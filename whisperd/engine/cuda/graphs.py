"""Work in a few fixed sizes, so that each can be recorded once and replayed without the host.

Padding, pieces and buffers are tested on the CPU; ``recorder``, which makes the CUDA graphs, HAS NEVER RUN ON A GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from whisperd.engine.cuda.device import uploaded

SMALLEST = 8

Action = Callable[[], None]
Record = Callable[[Action], Action]
Read = Callable[[Tensor, Tensor], None]
Step = Callable[[Tensor, bool], None]


def sizes(most: int) -> tuple[int, ...]:
    """8, 16, 32 ... and ``most``: a step costs little for rows that only pad it."""
    found = [SMALLEST]
    while found[-1] < most:
        found.append(min(2 * found[-1], most))
    return tuple(found)


class FixedSteps:
    """Runs a step for any rows at the next larger size.

    Args:
        step: writes one token in each of these rows (int64 [n]), sampled or greedy; it must not wait for the device.
        most: rows at the same time.
        padding: a row that nobody reads.
        device: where the rows are.
        record: makes an action that repeats another; None repeats by calling it.
    """

    def __init__(self, step: Step, *, most: int, padding: int, device: torch.device, record: Record | None) -> None:
        self._step = step
        self._padding = padding
        self._device = device
        self._record = record
        self._rows = {size: torch.full((size,), padding, dtype=torch.int64, device=device) for size in sizes(most)}
        self._actions: dict[tuple[int, bool], Action] = {}

    def __call__(self, rows: Sequence[int], n_steps: int, *, sampled: bool) -> None:
        """So many steps for these rows."""
        size = next(size for size in self._rows if size >= len(rows))
        action = self._action(size, sampled=sampled)
        padded = [*rows, *[self._padding] * (size - len(rows))]
        self._rows[size].copy_(uploaded(padded, self._device))
        for _ in range(n_steps):
            action()

    def _action(self, size: int, *, sampled: bool) -> Action:
        """Recorded at first use, with all rows padding: recording runs the step, and nobody may notice."""
        if (size, sampled) not in self._actions:
            rows = self._rows[size].fill_(self._padding)

            def action() -> None:
                self._step(rows, sampled)

            self._actions[size, sampled] = self._record(action) if self._record else action
        return self._actions[size, sampled]


def pieces(count: int, most: int) -> tuple[int, ...]:
    """So many as a sum of powers of two, the largest first: what computes all the time should not pad."""
    found = []
    while count:
        size = min(1 << count.bit_length() - 1, 1 << most.bit_length() - 1)
        found.append(size)
        count -= size
    return tuple(found)


class FixedWindows:
    """Reads the spectrograms of any number of windows, in pieces of fixed sizes.

    Args:
        read: reads spectrograms [n, n_mels, frames] into windows (int64 [n]); it must not wait for the device.
        most: windows of the largest piece.
        spectrogram: one of them; shape, type and place are those of all.
        record: makes an action that repeats another; None repeats by calling it.
    """

    def __init__(self, read: Read, *, most: int, spectrogram: Tensor, record: Record | None) -> None:
        self._read = read
        self._most = most
        self._record = record
        self._spectrograms = spectrogram.new_zeros((most, *spectrogram.shape))
        self._windows = torch.zeros(most, dtype=torch.int64, device=spectrogram.device)
        self._actions: dict[int, Action] = {}

    def __call__(self, spectrograms: Tensor, windows: Tensor) -> None:
        """Spectrograms [n, n_mels, frames] into windows (int64 [n])."""
        at = 0
        for size in pieces(len(windows), self._most):
            self._spectrograms[:size].copy_(spectrograms[at : at + size])
            self._windows[:size].copy_(windows[at : at + size])
            self._action(size)()
            at += size

    def _action(self, size: int) -> Action:
        """Recorded at first use; recording runs it, and what it reads is what shall be read."""
        if size not in self._actions:
            spectrograms, windows = self._spectrograms[:size], self._windows[:size]

            def action() -> None:
                self._read(spectrograms, windows)

            self._actions[size] = self._record(action) if self._record else action
        return self._actions[size]


def recorder() -> Record:
    """Makes CUDA graphs of actions. They run one after the other, so all share the memory of the largest."""
    pool = torch.cuda.graph_pool_handle()
    return lambda action: _recorded(action, pool)


def _recorded(action: Action, pool: tuple[int, int]) -> Action:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # libraries set themselves up at their first calls, which cannot be recorded
            action()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        action()
    return graph.replay  # type: ignore[no-any-return]
