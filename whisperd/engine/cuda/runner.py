"""What an engine asks of the device: encode, detect, begin, decode, align. Rows and windows are numbers here.

Nothing here waits for the device but ``detect``, ``progress``, ``texts``, ``beam_texts`` and ``align``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whisperd.engine.base import TokenTime
from whisperd.engine.checkpoints import Checkpoint
from whisperd.engine.cuda import memory
from whisperd.engine.cuda.alignment import attention_matrix, first_columns, joined, token_times
from whisperd.engine.cuda.beams import Beams
from whisperd.engine.cuda.caches import Caches, SlotAttention, gathered
from whisperd.engine.cuda.device import DeviceLogMel, uploaded, uploaded_audio
from whisperd.engine.cuda.failures import translated
from whisperd.engine.cuda.graphs import FixedSteps, FixedWindows, recorder
from whisperd.engine.cuda.model import Decoder, Encoder
from whisperd.engine.cuda.rows import RowPlan, Rows, RowText
from whisperd.engine.cuda.rules import TokenRules
from whisperd.engine.cuda.weights import load
from whisperd.speech.features import CHUNK_FRAMES, HOP_SAMPLES
from whisperd.speech.tokenizer import Vocabulary

PREFIX_CHUNK = 32  # tokens of a prefix that are read at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoken:
    """A text whose times are asked for: where its audio lies, how long that is, and a row that nobody uses."""

    row: int
    window: int
    n_samples: int
    start: tuple[int, ...]
    tokens: tuple[int, ...]


class Runner:
    """One model on one device. On a GPU its decode steps and its encoder are recorded.

    Args:
        checkpoint: what to load.
        vocabulary: its tokens.
        device: where to.
        dtype: what to compute with.
        slots: how many rows it writes at the same time; ``windows``, the audio that it holds, is a few more.
        fp8_cross: whether it keeps the audio in 8 bits.
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
            # one row more than anybody uses, for steps that are padded
            caches = Caches.allocate(shape, self.windows, slots + 1, device, dtype, fp8_cross=fp8_cross)
            self._decoder = Decoder(decoder, shape.decoder_heads, caches, _attention(device))
            self._rows = Rows(slots + 1, eot=vocabulary.eot, timestamp_begin=vocabulary.timestamp_begin, device=device)
            self._beams = Beams(self._rows, caches, eot=vocabulary.eot)
            self._rules = _rules(checkpoint, vocabulary, device)
            self.fixed: FixedSteps | None = None
            self.fixed_windows: FixedWindows | None = None
            if device.type == "cuda":
                self._record()
        self._ends: dict[int, int] = {}  # for each running row, behind its last position
        self._sampled: set[int] = set()

    def encode(self, samples: Sequence[NDArray[np.float32]], windows: Sequence[int]) -> None:
        """Reads audio (float32 [n], n <= 480000, each) into the slots of windows; raises OutOfMemory."""
        with translated(), torch.inference_mode():
            spectrograms = self._log_mel(uploaded_audio(samples, self.device)).to(self.dtype)
            read = self.read_windows if self.fixed_windows is None else self.fixed_windows
            read(spectrograms, self._index(windows))

    def detect(self, windows: Sequence[int], rows: Sequence[int], languages: Sequence[int]) -> list[list[float]]:
        """How likely each of these languages (ids) is for each window, among them; reads into ``rows`` for it."""
        with translated(), torch.inference_mode():
            first = self._index([0] * len(rows))
            start = torch.full((len(rows), 1), self._vocabulary.sot, device=self.device)
            states, _ = self._decoder(start, first, self._index(rows), self._index(windows), 1)
            logits = self._decoder.logits(states[:, 0])[:, self._index(languages)]
            found: list[list[float]] = logits.softmax(dim=-1).tolist()
            return found

    def begin(self, rows: Sequence[int], windows: Sequence[int], plans: Sequence[RowPlan]) -> None:
        """Shows rows their prefixes and writes their first tokens."""
        logits = self._shown(rows, windows, plans)
        sampled = any(plan.temperature > 0 for plan in plans)
        with translated(), torch.inference_mode():
            self._rows.write(self._index(rows), logits, self._rules, sampled=sampled)
        self._sampled.difference_update(rows)
        self._sampled.update(row for row, plan in zip(rows, plans, strict=True) if plan.temperature > 0)

    def begin_beams(self, group: Sequence[int], window: int, plan: RowPlan) -> None:
        """The same for rows that search the text of one window together."""
        logits = self._shown(group, [window] * len(group), [plan] * len(group))
        with translated(), torch.inference_mode():
            rows = self._index([list(group)])
            self._beams.begin(rows)
            self._beams.write(rows, logits, self._rules, self._ends[group[0]])
        self._sampled.difference_update(group)

    def decode_beams(self, groups: Sequence[Sequence[int]], n_steps: int) -> None:
        """Writes up to so many further tokens in each group; all have the same number of rows."""
        flat = [row for group in groups for row in group]
        bound = self._reach(flat, n_steps)
        with translated(), torch.inference_mode():
            rows, at = self._index([list(group) for group in groups]), self._index(flat)
            for _ in range(n_steps):
                self._beams.write(rows, self._next_logits(at, bound), self._rules, bound)

    def beam_texts(self, group: Sequence[int]) -> list[RowText]:
        """What a search has found."""
        return self._beams.texts(self._index(group))

    def decode(self, rows: Sequence[int], n_steps: int) -> None:
        """Writes up to so many further tokens in each row."""
        sampled = not self._sampled.isdisjoint(rows)
        bound = self._reach(rows, n_steps)
        with translated(), torch.inference_mode():
            if self.fixed is not None:
                self.fixed(rows, n_steps, sampled=sampled)
                return
            at = self._index(rows)
            for _ in range(n_steps):
                self._step(at, bound, sampled=sampled)

    def progress(self, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Those of the rows whose text is complete, and those of the others whose text repeats itself."""
        done, looping = self._rows.progress(self._index(rows)).tolist()
        flags = list(zip(rows, done, looping, strict=True))
        return [row for row, ended, _ in flags if ended], [row for row, ended, loops in flags if loops and not ended]

    def texts(self, rows: Sequence[int]) -> list[RowText]:
        """What rows wrote so far."""
        return self._rows.texts(self._index(rows))

    def align(self, texts: Sequence[Spoken]) -> list[tuple[TokenTime, ...]]:
        """Times of the text tokens; each text is read once more, all of it at once."""
        read = [[*text.start, self._vocabulary.no_timestamps, *text.tokens, self._vocabulary.eot] for text in texts]
        longest = max(map(len, read))
        padded = [tokens + [self._vocabulary.eot] * (longest - len(tokens)) for tokens in read]
        rows = self._index([text.row for text in texts])
        with translated(), torch.inference_mode():
            states, scores = self._decoder(
                self._index(padded),
                torch.zeros_like(rows),
                rows,
                self._index([text.window for text in texts]),
                longest,
                self._heads,
            )
            return self._times(texts, states, torch.stack(scores, dim=1))

    def close(self) -> None:
        """Lets go of all tensors."""
        del (
            self.fixed,
            self.fixed_windows,
            self._encoder,
            self._decoder,
            self._rows,
            self._beams,
            self._rules,
            self._log_mel,
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def read_windows(self, spectrograms: Tensor, windows: Tensor) -> None:
        """Reads spectrograms [n, n_mels, 3000] into slots (int64 [n]), waiting for nothing."""
        self._decoder.store(self._encoder(spectrograms), windows)

    def write_next(self, rows: Tensor, sampled: bool) -> None:
        """Writes one token in each row, waiting for nothing."""
        self._step(rows, self.shape.positions, sampled=sampled)

    def _record(self) -> None:
        """On a GPU alone; elsewhere steps and pieces have the size that they need."""
        record, device = recorder(), self.device
        self.fixed = FixedSteps(self.write_next, most=self.slots, padding=self.slots, device=device, record=record)
        spectrogram = torch.zeros((self.shape.n_mels, CHUNK_FRAMES), dtype=self.dtype, device=device)
        self.fixed_windows = FixedWindows(
            self.read_windows, most=memory.ENCODE_WINDOWS, spectrogram=spectrogram, record=record
        )

    def _reach(self, rows: Sequence[int], n_steps: int) -> int:
        """Moves the ends of rows on; returns the furthest."""
        for row in rows:
            self._ends[row] = min(self._ends[row] + n_steps, self.shape.positions)
        return max(self._ends[row] for row in rows)

    def _step(self, rows: Tensor, bound: int, *, sampled: bool) -> None:
        self._rows.write(rows, self._next_logits(rows, bound), self._rules, sampled=sampled)

    def _next_logits(self, rows: Tensor, bound: int) -> Tensor:
        """float32 [rows, vocabulary], behind what each row wrote last."""
        position = self._rows.position[rows]
        tokens = self._rows.last(rows)[:, None]
        states, _ = self._decoder(tokens, position, rows, self._rows.window[rows], bound)
        self._rows.position[rows] = (position + 1).clamp(max=self.shape.positions - 1)
        return self._decoder.logits(states[:, 0])

    def _shown(self, rows: Sequence[int], windows: Sequence[int], plans: Sequence[RowPlan]) -> Tensor:
        """Rows start anew and read their prefixes; float32 [rows, vocabulary]."""
        fitting = [_fitting(plan, self.shape.positions) for plan in plans]
        for row, plan in zip(rows, fitting, strict=True):
            self._ends[row] = len(plan.prefix)
        with translated(), torch.inference_mode():
            self._rows.begin(self._index(rows), windows, fitting)
            return self._read_prefixes(rows, windows, fitting)

    def _read_prefixes(self, rows: Sequence[int], windows: Sequence[int], plans: Sequence[RowPlan]) -> Tensor:
        """float32 [rows, vocabulary] behind each prefix; the no-speech probability is read at its start token.

        Chunks are padded at their ends: a row overwrites what the padding left before it can see it.
        """
        longest = max(len(plan.prefix) for plan in plans)
        lasts = torch.zeros((len(rows), self.shape.width), dtype=self.dtype, device=self.device)
        starts = torch.zeros_like(lasts)
        at_rows, at_windows = self._index(rows), self._index(windows)
        for begin in range(0, longest, PREFIX_CHUNK):
            length = min(PREFIX_CHUNK, longest - begin)
            tokens = [_chunk(plan.prefix, begin, length, self._vocabulary.eot) for plan in plans]
            first = torch.full_like(at_rows, begin)
            states, _ = self._decoder(self._index(tokens), first, at_rows, at_windows, begin + length)
            for target, places in (
                (lasts, [len(plan.prefix) - 1 for plan in plans]),
                (starts, [plan.start_at for plan in plans]),
            ):
                self._keep(target, states, [place - begin for place in places])
        probabilities = self._decoder.logits(starts).softmax(dim=-1)
        self._rows.no_speech[at_rows] = probabilities[:, self._vocabulary.no_speech]
        return self._decoder.logits(lasts)

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
        logits = self._decoder.logits(states[begin : begin + len(text.tokens)])[:, : self._vocabulary.eot]
        return logits.softmax(dim=-1).gather(1, self._index(text.tokens)[:, None])[:, 0]

    def _index(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return uploaded(numbers, self.device)


def _attention(device: torch.device) -> SlotAttention:
    """The kernel where Triton can compile it."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return gathered
    from whisperd.engine.cuda.kernels import slotted

    return slotted


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
