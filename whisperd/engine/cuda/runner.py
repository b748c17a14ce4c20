"""What an engine asks of the device: encode, detect, begin, decode, align. Rows and windows are numbers here.

Nothing here waits for the device but ``detect``, ``done``, ``texts`` and ``align``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whisperd.engine.base import WINDOW_SAMPLES, TokenTime
from whisperd.engine.checkpoint import Checkpoint
from whisperd.engine.cuda.align import attention_matrix, first_frames, token_times
from whisperd.engine.cuda.attention import SlotAttention, gathered
from whisperd.engine.cuda.graphs import FixedSteps, Step, recorder
from whisperd.engine.cuda.mel import DeviceLogMel
from whisperd.engine.cuda.model import Caches, Decoder, Encoder
from whisperd.engine.cuda.rows import RowPlan, Rows, RowText
from whisperd.engine.cuda.rules import TokenRules
from whisperd.engine.cuda.weights import load
from whisperd.errors import EngineError, OutOfMemory
from whisperd.features import HOP_SAMPLES
from whisperd.tokens import Vocabulary

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
    """One model on one device, with as many rows as windows. On a GPU its decode steps are recorded.

    Args:
        checkpoint: what to load.
        vocabulary: its tokens.
        device: where to.
        dtype: what to compute with.
        slots: how many windows and rows it holds.
    """

    def __init__(
        self, checkpoint: Checkpoint, vocabulary: Vocabulary, *, device: torch.device, dtype: torch.dtype, slots: int
    ) -> None:
        shape = checkpoint.shape
        self.shape = shape
        self.slots = slots
        self.device = device
        self.dtype = dtype
        self._vocabulary = vocabulary
        self._heads = checkpoint.alignment_heads
        self._log_mel = DeviceLogMel(shape.n_mels, device)
        with translated(), torch.inference_mode():
            encoder, decoder = load(checkpoint, device, dtype)
            self._encoder = Encoder(encoder, shape.encoder_heads)
            # one row more than anybody uses, for steps that are padded
            caches = Caches.allocate(shape, slots, slots + 1, device, dtype)
            self._decoder = Decoder(decoder, shape.decoder_heads, caches, _attention(device))
            self._rows = Rows(slots + 1, eot=vocabulary.eot, timestamp_begin=vocabulary.timestamp_begin, device=device)
            self._rules = _rules(checkpoint, vocabulary, device)
        self.fixed = _fixed_steps(self.write_next, slots, device)
        self._ends: dict[int, int] = {}  # for each running row, behind its last position
        self._sampled: set[int] = set()

    def encode(self, samples: Sequence[NDArray[np.float32]], windows: Sequence[int]) -> None:
        """Reads audio (float32 [n], n <= 480000, each) into the slots of windows; raises OutOfMemory."""
        padded = np.zeros((len(samples), WINDOW_SAMPLES), np.float32)
        for row, one in zip(padded, samples, strict=True):
            row[: len(one)] = one
        with translated(), torch.inference_mode():
            mel = self._log_mel(torch.from_numpy(padded).to(self.device))
            self._decoder.store(self._encoder(mel.to(self.dtype)), self._index(windows))

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
        fitting = [_fitting(plan, self.shape.positions) for plan in plans]
        with translated(), torch.inference_mode():
            self._rows.begin(self._index(rows), windows, fitting)
            logits = self._read_prefixes(rows, windows, fitting)
            sampled = any(plan.temperature > 0 for plan in fitting)
            self._rows.write(self._index(rows), logits, self._rules, sampled=sampled)
        for row, plan in zip(rows, fitting, strict=True):
            self._ends[row] = len(plan.prefix)
            self._sampled.discard(row)
            if plan.temperature > 0:
                self._sampled.add(row)

    def decode(self, rows: Sequence[int], n_steps: int) -> None:
        """Writes up to so many further tokens in each row."""
        sampled = not self._sampled.isdisjoint(rows)
        for row in rows:
            self._ends[row] = min(self._ends[row] + n_steps, self.shape.positions)
        with translated(), torch.inference_mode():
            if self.fixed is not None:
                self.fixed(rows, n_steps, sampled=sampled)
                return
            at, bound = self._index(rows), max(self._ends[row] for row in rows)
            for _ in range(n_steps):
                self._step(at, bound, sampled=sampled)

    def done(self, rows: Sequence[int]) -> list[int]:
        """Those of the rows whose text is complete."""
        flags = self._rows.done[self._index(rows)].tolist()
        return [row for row, flag in zip(rows, flags, strict=True) if flag]

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
            by_text = torch.stack(scores, dim=1)
            return [self._times(text, *pair) for text, *pair in zip(texts, states, by_text, strict=True)]

    def close(self) -> None:
        """Lets go of all tensors."""
        del self.fixed, self._encoder, self._decoder, self._rows, self._rules, self._log_mel
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def write_next(self, rows: Tensor, sampled: bool) -> None:
        """Writes one token in each row, waiting for nothing."""
        self._step(rows, self.shape.positions, sampled=sampled)

    def _step(self, rows: Tensor, bound: int, *, sampled: bool) -> None:
        position = self._rows.position[rows]
        tokens = self._rows.last(rows)[:, None]
        states, _ = self._decoder(tokens, position, rows, self._rows.window[rows], bound)
        self._rows.write(rows, self._decoder.logits(states[:, 0]), self._rules, sampled=sampled)
        self._rows.position[rows] = (position + 1).clamp(max=self.shape.positions - 1)

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
                _keep(target, states, [place - begin for place in places])
        probabilities = self._decoder.logits(starts).softmax(dim=-1)
        self._rows.no_speech[at_rows] = probabilities[:, self._vocabulary.no_speech]
        return self._decoder.logits(lasts)

    def _times(self, text: Spoken, states: Tensor, scores: Tensor) -> tuple[TokenTime, ...]:
        begin, end = len(text.start), len(text.start) + 1 + len(text.tokens)
        n_frames = min(self.shape.frames, -(-text.n_samples // HOP_SAMPLES) // 2)
        matrix = attention_matrix(scores[:, : end + 1, : max(1, n_frames)])[begin:end]
        logits = self._decoder.logits(states[begin : end - 1])[:, : self._vocabulary.eot]
        tokens = self._index(text.tokens)[:, None]
        probabilities = logits.softmax(dim=-1).gather(1, tokens)[:, 0].tolist()
        return token_times(text.tokens, first_frames(matrix.cpu().numpy()), probabilities)

    def _index(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


@contextmanager
def translated() -> Iterator[None]:
    """What torch raises as the errors of whisperd."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"the device has not enough memory: {error}") from error
    except RuntimeError as error:
        exhausted = "can't allocate memory" in str(error) or "out of memory" in str(error).lower()
        raise (OutOfMemory if exhausted else EngineError)(f"PyTorch failed: {error}") from error


def _attention(device: torch.device) -> SlotAttention:
    """The kernel where Triton can compile it."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return gathered
    from whisperd.engine.cuda.kernels import slotted

    return slotted


def _fixed_steps(step: Step, slots: int, device: torch.device) -> FixedSteps | None:
    """Recorded steps on a GPU; elsewhere steps have the size that they need."""
    if device.type != "cuda":
        return None
    return FixedSteps(step, most=slots, padding=slots, device=device, record=recorder())


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


def _keep(target: Tensor, states: Tensor, places: Sequence[int]) -> None:
    """Copies the states of those rows whose place is in this chunk."""
    rows = [row for row, place in enumerate(places) if 0 <= place < states.shape[1]]
    if rows:
        target[rows] = states[rows, [places[row] for row in rows]]
