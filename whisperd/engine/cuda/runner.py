"""The operations of an engine on the device: encode, detect, begin, decode, align. Rows and windows are numbers here.

Nothing here waits for the device but ``detect``, ``progress``, ``texts``, ``beam_texts`` and ``align``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from whisperd.engine.base import TokenTime
from whisperd.engine.checkpoints import Checkpoint
from whisperd.engine.cuda import memory
from whisperd.engine.cuda.alignment import attention_matrix, first_columns, joined, token_times
from whisperd.engine.cuda.beams import Beams
from whisperd.engine.cuda.caches import Caches, SlotOperations, TorchSlots
from whisperd.engine.cuda.device import AudioStage, DeviceLogMel, uploaded
from whisperd.engine.cuda.failures import translated
from whisperd.engine.cuda.graphs import (
    FixedChunks,
    FixedSteps,
    FixedWindows,
    Kind,
    Progress,
    Record,
    Recorded,
    recorder,
    sizes,
)
from whisperd.engine.cuda.model import Decoder, Encoder
from whisperd.engine.cuda.rows import RowPlan, Rows, RowText
from whisperd.engine.cuda.rules import TokenRules
from whisperd.engine.cuda.weights import load
from whisperd.engine.devices import kernel_obstacle
from whisperd.speech.features import CHUNK_FRAMES, HOP_SAMPLES
from whisperd.speech.tokenizer import Vocabulary
from whisperd.speech.units import Floats

log = logging.getLogger(__name__)

CHUNKS = (4, 32)  # tokens of a prefix that are read at once: all of one without a prompt, and parts of longer ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoken:
    """A text whose token times are wanted: its audio, in which window and how long, and a free row to read it in."""

    row: int
    window: int
    n_samples: int
    start: tuple[int, ...]
    tokens: tuple[int, ...]


class Choose(Protocol):
    """Writes one token in each row."""

    def __call__(self, rows: Tensor, logits: Tensor, *, sampled: bool) -> None:
        """Rows int64 [n], logits [n, vocabulary] of any type; see ``Rows.write``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """How an engine works on slots and rows: in Triton, or in plain PyTorch."""

    slots: SlotOperations
    chooser: Callable[[Rows, TokenRules], Choose]


class Runner:
    """One model on one device. On a GPU its encoder, prefixes and decode steps are recorded while it loads.

    Args:
        checkpoint: the model.
        vocabulary: its tokens.
        device: loads it there.
        dtype: computes in it.
        slots: rows that it writes at the same time; ``windows``, the audio that it holds, is a few more.
        fp8_cross: keeps the audio in 8 bits.
        kernels: the operations on slots and rows; None: the fastest of this device.
        progress: called with the numbers of recorded graphs and of all graphs.

    Raises:
        OutOfMemory: weights, slots or graphs do not fit.
        EngineError: the device failed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        vocabulary: Vocabulary,
        *,
        device: torch.device,
        dtype: torch.dtype,
        slots: int,
        fp8_cross: bool = False,
        kernels: Kernels | None = None,
        progress: Progress | None = None,
    ) -> None:
        shape = checkpoint.shape
        self.shape = shape
        self.slots = slots
        self.windows = slots + memory.kept(slots)
        self.device = device
        self.dtype = dtype
        self._vocabulary = vocabulary
        self._heads = checkpoint.alignment_heads
        self._log_mel = DeviceLogMel(shape.n_mels, device)
        with translated(), torch.inference_mode():
            encoder, decoder = load(checkpoint, device, dtype)
            self._encoder = Encoder(encoder, shape.encoder_heads)
            kernels = kernels or fastest_kernels(device)
            # one row more than are used, for steps that are padded
            caches = Caches.allocate(
                shape, self.windows, slots + 1, device, dtype, fp8_cross=fp8_cross, slots=kernels.slots
            )
            self.decoder = Decoder(decoder, shape.decoder_heads, caches)
            self.rows = Rows(slots + 1, eot=vocabulary.eot, timestamp_begin=vocabulary.timestamp_begin, device=device)
            self._beams = Beams(self.rows, caches, eot=vocabulary.eot)
            self.rules = _rules(checkpoint, vocabulary, device)
            self._choose = kernels.chooser(self.rows, self.rules)
            self._beam_logits = torch.empty((sizes(slots)[-1], shape.vocabulary_size), dtype=dtype, device=device)
            self._stage = AudioStage(2 * memory.ENCODE_WINDOWS, device)
            self.recorded: Recorded | None = None
            if device.type == "cuda":
                self.record(recorder(), progress)
        self._ends: dict[int, int] = {}  # for each running row, behind its last position
        self._sampled: set[int] = set()

    def stage(self, key: int, samples: Floats) -> None:
        """Copies audio (float32 [n], n <= 480000) into pinned memory, from which ``encode`` takes it."""
        with translated():
            self._stage.put(key, samples)

    def encode(self, samples: Sequence[Floats], windows: Sequence[int], keys: Sequence[int] | None = None) -> None:
        """Encodes audio (float32 [n], n <= 480000, each) into the slots of windows; ``keys`` are those of ``stage``.

        Raises:
            OutOfMemory: fewer windows at once may fit.
        """
        with translated(), torch.inference_mode():
            spectrograms = self._log_mel(self._stage.send(samples, keys)).to(self.dtype)
            read = self.read_windows if self.recorded is None else self.recorded.encode
            read(spectrograms, self._index(windows))

    def detect(self, windows: Sequence[int], rows: Sequence[int], languages: Sequence[int]) -> list[list[float]]:
        """The probability of each of these languages (ids) for each window; overwrites the text of ``rows``."""
        with translated(), torch.inference_mode():
            start = [[self._vocabulary.sot] for _ in rows]
            states = self._read_chunk(start, 0, self._index(rows), self._index(windows))
            logits = self.decoder.logits(states[:, 0])[:, self._index(languages)].float()
            found: list[list[float]] = logits.softmax(dim=-1).tolist()
            return found

    def begin(self, rows: Sequence[int], windows: Sequence[int], plans: Sequence[RowPlan]) -> None:
        """Reads the prefixes of rows and writes their first tokens."""
        logits = self._shown(rows, windows, plans)
        sampled = any(plan.temperature > 0 for plan in plans)
        with translated(), torch.inference_mode():
            self._choose(self._index(rows), logits, sampled=sampled)
        self._sampled.difference_update(rows)
        self._sampled.update(row for row, plan in zip(rows, plans, strict=True) if plan.temperature > 0)

    def begin_beams(self, group: Sequence[int], window: int, plan: RowPlan) -> None:
        """The same for rows that search the text of one window together."""
        logits = self._shown(group, [window] * len(group), [plan] * len(group))
        with translated(), torch.inference_mode():
            rows = self._index([list(group)])
            self._beams.begin(rows)
            self._beams.write(rows, logits.float(), self.rules, self._ends[group[0]])
        self._sampled.difference_update(group)

    def decode_beams(self, groups: Sequence[Sequence[int]], n_steps: int) -> None:
        """Writes up to so many further tokens in each group; all have the same number of rows."""
        flat = [row for group in groups for row in group]
        bound = self._reach(flat, n_steps)
        with translated(), torch.inference_mode():
            rows, at = self._index([list(group) for group in groups]), self._index(flat)
            for _ in range(n_steps):
                logits = self._next_beam_logits(flat, at, bound)
                self._beams.write(rows, logits.float(), self.rules, bound)

    def beam_texts(self, group: Sequence[int]) -> list[RowText]:
        """The texts of a search, finished ones first."""
        return self._beams.texts(self._index(group))

    def decode(self, rows: Sequence[int], n_steps: int) -> None:
        """Writes up to so many further tokens in each row."""
        sampled = not self._sampled.isdisjoint(rows)
        bound = self._reach(rows, n_steps)
        with translated(), torch.inference_mode():
            if self.recorded is not None:
                self.recorded.step(rows, n_steps, "sampled" if sampled else "greedy")
                return
            at = self._index(rows)
            for _ in range(n_steps):
                self._step(at, bound, sampled=sampled)

    def progress(self, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """The rows whose text is complete, and those of the others whose text repeats itself; waits for the device."""
        done, looping = self.rows.progress(self._index(rows)).tolist()
        flags = list(zip(rows, done, looping, strict=True))
        return [row for row, ended, _ in flags if ended], [row for row, ended, loops in flags if loops and not ended]

    def texts(self, rows: Sequence[int]) -> list[RowText]:
        """The texts of rows so far; waits for the device."""
        return self.rows.texts(self._index(rows))

    def align(self, texts: Sequence[Spoken]) -> list[tuple[TokenTime, ...]]:
        """Times of the text tokens; each text is read once more in one pass. Waits for the device."""
        read = [[*text.start, self._vocabulary.no_timestamps, *text.tokens, self._vocabulary.eot] for text in texts]
        longest = max(map(len, read))
        padded = [tokens + [self._vocabulary.eot] * (longest - len(tokens)) for tokens in read]
        rows = self._index([text.row for text in texts])
        with translated(), torch.inference_mode():
            states, scores = self.decoder(
                self._index(padded),
                torch.zeros_like(rows),
                rows,
                self._index([text.window for text in texts]),
                longest,
                self._heads,
            )
            return self._times(texts, states, torch.stack(scores, dim=1))

    def close(self) -> None:
        """Frees all tensors."""
        del (
            self.recorded,
            self._choose,
            self._beam_logits,
            self._stage,
            self._encoder,
            self.decoder,
            self.rows,
            self._beams,
            self.rules,
            self._log_mel,
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def read_windows(self, spectrograms: Tensor, windows: Tensor) -> None:
        """Encodes spectrograms [n, n_mels, 3000] into slots (int64 [n]); waits for nothing."""
        self.decoder.store(self._encoder(spectrograms), windows)

    def write_next(self, rows: Tensor, kind: Kind) -> None:
        """Writes one token in each row (int64 [n]), or the logits for one in ``_beam_logits``; waits for nothing."""
        if kind == "logits":
            self._beam_logits[: len(rows)].copy_(self._next_logits(rows, self.shape.positions))
            return
        self._step(rows, self.shape.positions, sampled=kind == "sampled")

    def read_prefixes(self, tokens: Tensor, first: Tensor, rows: Tensor, windows: Tensor) -> Tensor:
        """Reads tokens [n, new] from the positions ``first`` on; states [n, new, width]. Waits for nothing."""
        return self.decoder(tokens, first, rows, windows, self.shape.positions)[0]

    def record(self, record: Record | None, progress: Progress | None = None) -> None:
        """Gives all work fixed sizes and records it (None: without recording it, for tests)."""
        with translated(), torch.inference_mode():
            spectrogram = torch.zeros((self.shape.n_mels, CHUNK_FRAMES), dtype=self.dtype, device=self.device)
            recorded = Recorded(
                steps=FixedSteps(self.write_next, most=self.slots, padding=self.slots, device=self.device),
                windows=FixedWindows(self.read_windows, most=memory.ENCODE_WINDOWS, spectrogram=spectrogram),
                chunks=FixedChunks(
                    self.read_prefixes,
                    most=memory.ENCODE_WINDOWS,
                    lengths=CHUNKS,
                    padding=self.slots,
                    like=torch.zeros(self.shape.width, dtype=self.dtype, device=self.device),
                ),
            )
            recorded.record(record, progress)
        self.recorded = recorded

    def _reach(self, rows: Sequence[int], n_steps: int) -> int:
        """Moves the ends of rows on; returns the furthest."""
        for row in rows:
            self._ends[row] = min(self._ends[row] + n_steps, self.shape.positions)
        return max(self._ends[row] for row in rows)

    def _step(self, rows: Tensor, bound: int, *, sampled: bool) -> None:
        self._choose(rows, self._next_logits(rows, bound), sampled=sampled)

    def _next_logits(self, rows: Tensor, bound: int) -> Tensor:
        """[rows, vocabulary], behind the last token of each row; rows that are done read nothing."""
        position = self.rows.position[rows]
        tokens, active = self.rows.last[rows][:, None], ~self.rows.done[rows]
        states, _ = self.decoder(tokens, position, rows, self.rows.window[rows], bound, active=active)
        self.rows.position[rows] = (position + 1).clamp(max=self.shape.positions - 1)
        return self.decoder.logits(states[:, 0])

    def _next_beam_logits(self, rows: Sequence[int], at: Tensor, bound: int) -> Tensor:
        if self.recorded is None:
            return self._next_logits(at, bound)
        self.recorded.step(rows, 1, "logits")
        return self._beam_logits[: len(rows)]

    def _shown(self, rows: Sequence[int], windows: Sequence[int], plans: Sequence[RowPlan]) -> Tensor:
        """Resets rows and reads their prefixes; [rows, vocabulary]."""
        fitting = [_fitting(plan, self.shape.positions) for plan in plans]
        for row, plan in zip(rows, fitting, strict=True):
            self._ends[row] = len(plan.prefix)
        with translated(), torch.inference_mode():
            self.rows.begin(self._index(rows), windows, fitting)
            return self._read_prefixes(rows, windows, fitting)

    def _read_prefixes(self, rows: Sequence[int], windows: Sequence[int], plans: Sequence[RowPlan]) -> Tensor:
        """[rows, vocabulary] behind each prefix; stores the no-speech probability at its start token.

        Chunks are padded at their ends: a row overwrites what the padding left before it can see it.
        """
        longest = max(len(plan.prefix) for plan in plans)
        lasts = torch.zeros((len(rows), self.shape.width), dtype=self.dtype, device=self.device)
        starts = torch.zeros_like(lasts)
        at_rows, at_windows = self._index(rows), self._index(windows)
        for begin in range(0, longest, CHUNKS[-1]):
            length = min(CHUNKS[-1], longest - begin)
            tokens = [_chunk(plan.prefix, begin, length, self._vocabulary.eot) for plan in plans]
            states = self._read_chunk(tokens, begin, at_rows, at_windows)
            for target, places in (
                (lasts, [len(plan.prefix) - 1 for plan in plans]),
                (starts, [plan.start_at for plan in plans]),
            ):
                self._keep(target, states, [place - begin for place in places])
        probabilities = self.decoder.logits(starts).float().softmax(dim=-1)
        self.rows.no_speech[at_rows] = probabilities[:, self._vocabulary.no_speech]
        return self.decoder.logits(lasts)

    def _read_chunk(self, tokens: Sequence[Sequence[int]], begin: int, rows: Tensor, windows: Tensor) -> Tensor:
        """Reads tokens of equal number in each row from the position ``begin`` on; states [rows, new, width]."""
        length, first = len(tokens[0]), torch.full_like(rows, begin)
        if self.recorded is not None:
            fixed = next(one for one in CHUNKS if one >= length)
            if begin + fixed <= self.shape.positions:
                padded = self._index([[*one, *[self._vocabulary.eot] * (fixed - length)] for one in tokens])
                return self.recorded.read(padded, first, rows, windows)[:, :length]
        return self.decoder(self._index(tokens), first, rows, windows, begin + length)[0]

    def _keep(self, target: Tensor, states: Tensor, places: Sequence[int]) -> None:
        """Copies the states of those rows whose place is in this chunk."""
        rows = [row for row, place in enumerate(places) if 0 <= place < states.shape[1]]
        if rows:
            at = self._index(rows)
            target[at] = states[at, self._index([places[row] for row in rows])]

    def _times(self, texts: Sequence[Spoken], states: Tensor, scores: Tensor) -> list[tuple[TokenTime, ...]]:
        """Paths and probabilities of all texts; the host waits once, for both together."""
        matrices = [self._matrix(text, mine) for text, mine in zip(texts, scores, strict=True)]
        sizes = self._index([list(matrix.shape) for matrix in matrices])
        starts = first_columns(-joined(matrices), sizes[:, 0], sizes[:, 1])
        probabilities = torch.zeros_like(starts, dtype=torch.float64)
        for place, text, mine in zip(probabilities, texts, states, strict=True):
            place[: len(text.tokens)] = self._probabilities(text, mine)
        found = torch.stack([starts.double(), probabilities]).tolist()
        return [
            token_times(text.tokens, frames[: len(text.tokens) + 1], likely[: len(text.tokens)])
            for text, frames, likely in zip(texts, *found, strict=True)
        ]

    def _matrix(self, text: Spoken, scores: Tensor) -> Tensor:
        """float32 [tokens + 1, frames]: how each token and the end attend to the audio."""
        begin, end = len(text.start), len(text.start) + 1 + len(text.tokens)
        n_frames = min(self.shape.frames, -(-text.n_samples // HOP_SAMPLES) // 2)
        return attention_matrix(scores[:, : end + 1, : max(1, n_frames)])[begin:end]

    def _probabilities(self, text: Spoken, states: Tensor) -> Tensor:
        begin = len(text.start)
        logits = self.decoder.logits(states[begin : begin + len(text.tokens)])[:, : self._vocabulary.eot]
        return logits.float().softmax(dim=-1).gather(1, self._index(text.tokens)[:, None])[:, 0]

    def _index(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return uploaded(numbers, self.device)


def fastest_kernels(device: torch.device) -> Kernels:
    """Triton's on a GPU, plain PyTorch elsewhere; logs what Triton lacks on a GPU."""
    plain = Kernels(slots=TorchSlots(), chooser=lambda rows, rules: partial(rows.write, rules=rules))
    if device.type != "cuda":
        return plain
    missing = kernel_obstacle()
    if missing is not None:
        log.warning("the engine runs without its kernels, at a fraction of their speed: %s", missing)
        return plain
    from whisperd.engine.cuda.kernels import SlotKernels
    from whisperd.engine.cuda.sampling_kernel import TokenChooser

    return Kernels(slots=SlotKernels(), chooser=TokenChooser)


def _rules(checkpoint: Checkpoint, vocabulary: Vocabulary, device: torch.device) -> TokenRules:
    """Ids that steer the model are never text, whatever the checkpoint says."""
    steering = (
        vocabulary.sot, vocabulary.sot_prev, vocabulary.transcribe, vocabulary.translate, vocabulary.no_speech
    )  # fmt: skip
    return TokenRules(
        size=checkpoint.shape.vocabulary_size,
        eot=vocabulary.eot,
        no_timestamps=vocabulary.no_timestamps,
        suppressed=(*checkpoint.suppressed, *steering),
        suppressed_first=checkpoint.suppressed_first,
        device=device,
    )


def _fitting(plan: RowPlan, positions: int) -> RowPlan:
    """The last token is written from the last position and needs none itself."""
    return replace(plan, max_tokens=min(plan.max_tokens, positions + 1 - len(plan.prefix)))


def _chunk(prefix: tuple[int, ...], begin: int, length: int, padding: int) -> list[int]:
    part = list(prefix[begin : begin + length])
    return part + [padding] * (length - len(part))
