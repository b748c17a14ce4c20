"""Work in a few fixed sizes, each recorded once while the model loads and replayed in one launch.

Padding, pieces and buffers are tested on the CPU; ``recorder``, which makes the CUDA graphs, HAS NEVER RUN ON A GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from whisperd.engine.cuda.device import uploaded

SMALLEST = 8

Kind = Literal["greedy", "sampled", "logits"]  # of a step: it writes a token, or the logits for one
KINDS: tuple[Kind, ...] = ("greedy", "sampled", "logits")
Action = Callable[[], None]
Record = Callable[[Action], Action]
Progress = Callable[[int, int], None]
Encode = Callable[[Tensor, Tensor], None]
Step = Callable[[Tensor, Kind], None]
Read = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def sizes(most: int) -> tuple[int, ...]:
    """8, 16, 32 ... and ``most``: a step costs little for rows that only pad it."""
    found = [SMALLEST]
    while found[-1] < most:
        found.append(min(2 * found[-1], most))
    return tuple(found)


def pieces(count: int, most: int) -> tuple[int, ...]:
    """``count`` as a sum of powers of two up to ``most``, the largest first: encoding should not pad."""
    found = []
    while count:
        size = min(1 << count.bit_length() - 1, 1 << most.bit_length() - 1)
        found.append(size)
        count -= size
    return tuple(found)


def piece_sizes(most: int) -> tuple[int, ...]:
    """All sizes that ``pieces`` uses, the largest first."""
    return tuple(1 << power for power in reversed(range(most.bit_length())))


class FixedSteps:
    """Runs a step for any rows at the next larger size.

    Args:
        step: writes one token in each of these rows (int64 [n]); it must not wait for the device.
        most: rows at the same time.
        padding: a row that is never used, and done.
        device: where the rows are.
    """

    def __init__(self, step: Step, *, most: int, padding: int, device: torch.device) -> None:
        self._step = step
        self._padding = padding
        self._device = device
        self._rows = {size: torch.full((size,), padding, dtype=torch.int64, device=device) for size in sizes(most)}
        self._actions = {
            (size, kind): partial(step, rows, kind) for size, rows in reversed(self._rows.items()) for kind in KINDS
        }

    @property
    def actions(self) -> dict[tuple[int, Kind], Action]:
        """What may be recorded, the largest first. Recording runs it, with all rows padding."""
        return self._actions  # type: ignore[return-value]

    def __call__(self, rows: Sequence[int], n_steps: int, kind: Kind) -> None:
        """Runs ``n_steps`` steps for these rows."""
        size = next(size for size in self._rows if size >= len(rows))
        padded = [*rows, *[self._padding] * (size - len(rows))]
        self._rows[size].copy_(uploaded(padded, self._device))
        for _ in range(n_steps):
            self.actions[size, kind]()


class FixedWindows:
    """Encodes any number of windows in pieces of fixed sizes.

    Args:
        encode: encodes spectrograms [n, n_mels, frames] into windows (int64 [n]); it must not wait for the device.
        most: windows of the largest piece.
        spectrogram: one of them, for shape, type and device.
    """

    def __init__(self, encode: Encode, *, most: int, spectrogram: Tensor) -> None:
        self._most = most
        self._spectrograms = spectrogram.new_zeros((most, *spectrogram.shape))
        self._windows = torch.zeros(most, dtype=torch.int64, device=spectrogram.device)
        self.actions: dict[int, Action] = {
            size: partial(encode, self._spectrograms[:size], self._windows[:size]) for size in piece_sizes(most)
        }

    def __call__(self, spectrograms: Tensor, windows: Tensor) -> None:
        """Encodes spectrograms [n, n_mels, frames] into windows (int64 [n])."""
        at = 0
        for size in pieces(len(windows), self._most):
            self._spectrograms[:size].copy_(spectrograms[at : at + size])
            self._windows[:size].copy_(windows[at : at + size])
            self.actions[size]()
            at += size


class FixedChunks:
    """Reads chunks of prefixes in any number of rows, in pieces of fixed sizes and lengths.

    Args:
        read: reads tokens [n, length] from the positions [n] on in rows [n] with windows [n], all int64, and returns
            states [n, length, width]; it must not wait for the device.
        most: rows of the largest piece.
        lengths: of chunks.
        padding: a row that is never used.
        like: one state [width], for type and device.
    """

    def __init__(self, read: Read, *, most: int, lengths: Sequence[int], padding: int, like: Tensor) -> None:
        self._most = most

        def integers(*size: int, value: int = 0) -> Tensor:
            return torch.full(size, value, dtype=torch.int64, device=like.device)

        self._first, self._windows, self._rows = integers(most), integers(most), integers(most, value=padding)
        self._tokens = {length: integers(most, length) for length in lengths}
        self._states = {length: like.new_zeros((most, length, len(like))) for length in lengths}

        def action(size: int, length: int) -> None:
            places = (self._first[:size], self._rows[:size], self._windows[:size])
            self._states[length][:size].copy_(read(self._tokens[length][:size], *places))

        self.actions: dict[tuple[int, int], Action] = {
            (size, length): partial(action, size, length)
            for size in piece_sizes(most)
            for length in sorted(lengths, reverse=True)
        }

    def __call__(self, tokens: Tensor, first: Tensor, rows: Tensor, windows: Tensor) -> Tensor:
        """Tokens [n, length] to states [n, length, width], which belong to the caller."""
        length, at, found = tokens.shape[1], 0, []
        for size in pieces(len(rows), self._most):
            piece = slice(at, at + size)
            self._tokens[length][:size].copy_(tokens[piece])
            for buffer, given in ((self._first, first), (self._rows, rows), (self._windows, windows)):
                buffer[:size].copy_(given[piece])
            self.actions[size, length]()
            found.append(self._states[length][:size].clone())
            at += size
        return torch.cat(found) if len(found) > 1 else found[0]


class Recorded:
    """All work of an engine in fixed sizes, recorded once."""

    def __init__(self, *, steps: FixedSteps, windows: FixedWindows, chunks: FixedChunks) -> None:
        self.step = steps
        self.encode = windows
        self.read = chunks

    def record(self, record: Record | None, progress: Progress | None = None) -> None:
        """Replaces every action by its recording, the largest first: all share the memory that the largest needs.

        Args:
            record: makes an action that repeats another; None leaves all as they are.
            progress: called with the numbers of recorded and of all actions.
        """
        if record is None:
            return
        groups: list[dict[Any, Action]] = [self.encode.actions, self.read.actions, self.step.actions]
        places = [(group, key) for group in groups for key in group]
        for done, (group, key) in enumerate(places, 1):
            group[key] = record(group[key])
            if progress is not None:
                progress(done, len(places))


def recorder() -> Record:
    """Makes CUDA graphs of actions, on one stream and in one pool of memory: they run one after the other."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(action: Action) -> Action:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries set themselves up at their first calls, which cannot be recorded
                action()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            action()
        return graph.replay  # type: ignore[no-any-return]

    return record
