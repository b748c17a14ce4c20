"""The engine on PyTorch: windows join whenever a slot is free, and leave as soon as their text is complete."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from whisperd.engine import checkpoints
from whisperd.engine.base import EngineHealth, EngineInfo, Outcome, TokenTime, Window, WindowFailure
from whisperd.engine.cuda import memory
from whisperd.engine.cuda.caches import FP8
from whisperd.engine.cuda.jobs import Job, Slot, Slots, asks_for_beams
from whisperd.engine.cuda.rows import RowPlan, RowText
from whisperd.engine.cuda.runner import Runner, Spoken
from whisperd.engine.cuda.vad import DeviceSpeech
from whisperd.engine.devices import fp8_obstacle
from whisperd.errors import EngineError, OutOfMemory
from whisperd.metrics import ModelMeter
from whisperd.speech.fallback import compression_ratio
from whisperd.speech.tokenizer import Vocabulary

log = logging.getLogger(__name__)

STEPS_PER_TURN = 4  # tokens of each row between two reads of the done flags: a row wastes less than that many
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class CudaEngine:
    """One loaded model behind the contract of ``whisperd.engine.base``; ``load`` opens it.

    Args:
        runner: the model on its device.
        vocabulary: its tokens.
        compute_type: of the runner, for ``info``.
        ahead: windows that wait inside beyond the rows, so that a free row has its next window without a turn through
            the batcher, and their audio is copied while the device works.
        meter: receives the figures of each turn.
    """

    def __init__(
        self,
        runner: Runner,
        vocabulary: Vocabulary,
        *,
        compute_type: str,
        ahead: int = 0,
        meter: ModelMeter | None = None,
    ) -> None:
        self._meter = meter or ModelMeter()
        self._runner = runner
        self.vocabulary = vocabulary
        self._info = EngineInfo(
            engine="pytorch",
            device=runner.device.type,
            compute_type=compute_type,
            multilingual=vocabulary.multilingual,
            languages=tuple(vocabulary.languages),
            slots=runner.slots + ahead,
        )
        self._waiting: list[Window] = []
        self._refused: list[Window] = []
        self._jobs: list[Job] = []
        self._free_slots = Slots(runner.windows)
        self._free_rows = list(range(runner.slots))
        self._encode_windows = memory.ENCODE_WINDOWS

    @classmethod
    def load(
        cls,
        path: Path,
        vocabulary: Vocabulary,
        *,
        device: str,
        compute_type: str = "auto",
        slots: int = 0,
        budget_bytes: int = 0,
        fp8_cross: bool = False,
        meter: ModelMeter | None = None,
    ) -> CudaEngine:
        """Opens a snapshot in either format.

        Args:
            path: directory with ``model.bin`` or safetensors.
            vocabulary: its tokens.
            device: ``cuda``, or ``cpu`` for tests.
            compute_type: float16, bfloat16 or float32; auto is float16 on a GPU.
            slots: windows at the same time; 0: as many as the memory holds.
            budget_bytes: the most memory to use; 0: all free memory.
            fp8_cross: keeps the audio of windows in 8 bits.
            meter: receives the figures of each turn.

        Raises:
            SourceError: the snapshot is no whole Whisper.
            OutOfMemory: not even one window fits.
            EngineError: the compute type is unknown here, or the card cannot read 8 bits.
        """
        name = ("float32" if device == "cpu" else "float16") if compute_type == "auto" else compute_type
        if name not in DTYPES:
            raise EngineError(
                f"engine.compute_type {name!r} is for the cpu; on a GPU it is one of auto, {', '.join(DTYPES)}"
            )
        if fp8_cross and device == "cuda":
            _require_fp8()
        found = checkpoints.read(path)
        item_bytes, audio_item_bytes = DTYPES[name].itemsize, FP8.itemsize if fp8_cross else 0
        budget_bytes = _budget_bytes(device, budget_bytes)
        wanted = slots or memory.slots(found.shape, item_bytes, budget_bytes, audio_item_bytes=audio_item_bytes)
        runner = _opened(found, vocabulary, device, name, wanted, fp8_cross=fp8_cross)
        return cls(runner, vocabulary, compute_type=name, ahead=memory.ahead(runner.slots), meter=meter)

    @property
    def info(self) -> EngineInfo:
        """Constant facts about the loaded model."""
        return self._info

    @cached_property
    def detector(self) -> DeviceSpeech:
        """The voice detector on the same device."""
        return DeviceSpeech(self._runner.device)

    @property
    def health(self) -> EngineHealth:
        """Constant here: a failed engine is replaced from outside."""
        return EngineHealth()

    @property
    def free_slots(self) -> int:
        """How many more windows ``admit`` takes now."""
        return self._info.slots - len(self._refused) - len(self._waiting) - len(self._jobs)

    def admit(self, windows: Sequence[Window]) -> None:
        """Queues windows; the next steps encode them. Windows that ask for too many beams come back as failures."""
        for window in windows:
            too_many = asks_for_beams(window) and window.request.beam_size > self._runner.slots
            (self._refused if too_many else self._waiting).append(window)

    def step(self) -> Sequence[Outcome]:
        """Encodes waiting windows, writes a few tokens in every row, and returns the windows that are complete."""
        outcomes = [*self._refusals(), *self._let_in()]
        self._start_rows([job for job in self._jobs if job.unstarted])
        self._write()
        return [*outcomes, *self._complete()]

    def cancel(self, window_ids: frozenset[int]) -> None:
        """Drops windows at once."""
        self._waiting = [window for window in self._waiting if window.id not in window_ids]
        self._refused = [window for window in self._refused if window.id not in window_ids]
        for job in [job for job in self._jobs if job.window.id in window_ids]:
            self._leave(job)

    def close(self) -> None:
        """Frees all memory of the device."""
        self._waiting.clear()
        self._jobs.clear()
        self._runner.close()

    def plan(self, window: Window, language: str) -> RowPlan:
        """The plan for the rows of a window; benchmarks force lengths here."""
        request = window.request
        prefix = self.vocabulary.prefix(request.task, language, request.prompt_tokens)
        n_start = len(self.vocabulary.start(request.task, language))
        return RowPlan(prefix=tuple(prefix), start_at=len(prefix) - n_start, temperature=request.temperature)

    def _refusals(self) -> list[Outcome]:
        refused, self._refused = self._refused, []
        error = EngineError(f"decode.beam_size must be at most {self._runner.slots}: the memory holds no more rows")
        return [WindowFailure(window_id=window.id, error=error) for window in refused]

    def _let_in(self) -> list[Outcome]:
        """Encodes the next windows; half as many from now on, if the memory is not enough."""
        count = min(len(self._waiting), len(self._free_slots), len(self._free_rows), self._encode_windows)
        windows = self._next(count)
        taken = {window.id for window in windows}
        self._waiting = [window for window in self._waiting if window.id not in taken]
        try:
            self._encode(windows)
        except OutOfMemory as error:
            if count == 1:
                return [WindowFailure(window_id=windows[0].id, error=error)]
            self._encode_windows = count // 2
            log.warning("out of memory with %d windows to encode; trying %d", count, self._encode_windows)
            self._meter.count_halving("decode")
            self._waiting = [*windows, *self._waiting]
        return []

    def _next(self, count: int) -> list[Window]:
        """The oldest window, so that each has its turn, then interactive ones, then the others."""
        ranks = [(place > 0, window.lane != "interactive") for place, window in enumerate(self._waiting)]
        return [self._waiting[place] for place in sorted(range(len(ranks)), key=ranks.__getitem__)[:count]]

    def _stage(self) -> None:
        """Copies the audio of the next windows where the device reads it; the device decodes meanwhile."""
        for window in self._next(self._encode_windows):
            self._runner.stage(window.id, window.samples)

    def _encode(self, windows: Sequence[Window]) -> None:
        if not windows:
            return
        found = {window.id: self._free_slots.holding(window.audio) for window in windows}  # before any is overwritten
        jobs = [Job(window=window, slot=found[window.id] or self._free_slots.oldest()) for window in windows]
        new = [job for job in jobs if found[job.window.id] is None]
        try:
            if new:
                self._runner.encode(
                    [job.window.samples for job in new],
                    [job.slot.number for job in new],
                    [job.window.id for job in new],
                )
            self._find_languages(jobs)
        except OutOfMemory:
            for job in jobs:
                self._free_slots.give_back(job.slot)
            raise
        for job in new:
            job.slot.audio = job.window.audio
        for job in jobs:
            job.plan_rows(self.plan(job.window, job.language[0]))
        self._jobs += jobs

    def _find_languages(self, jobs: Sequence[Job]) -> None:
        """The requested language, or the one that the model detects; detection overwrites a free row for a moment."""
        asked = [job for job in jobs if job.window.request.language is not None]
        for job in asked:
            job.language = (job.window.request.language or "", 1.0)
        unknown = [job for job in jobs if job.window.request.language is None]
        if not self.vocabulary.multilingual:
            for job in jobs:
                job.language = ("en", 1.0)
            return
        self._detect([job.slot for job in unknown if not job.slot.languages])
        for job in unknown:
            job.language = self._likeliest(job.slot.languages, job.window.request.languages)

    def _detect(self, slots: Sequence[Slot]) -> None:
        if not slots:
            return
        rows, ids = self._free_rows[: len(slots)], tuple(self.vocabulary.languages.values())
        found = self._runner.detect([slot.number for slot in slots], rows, ids)
        for slot, probabilities in zip(slots, found, strict=True):
            slot.languages = probabilities

    def _likeliest(self, probabilities: Sequence[float], among: Sequence[str]) -> tuple[str, float]:
        known = zip(self.vocabulary.languages, probabilities, strict=True)
        candidates = [(code, probability) for code, probability in known if not among or code in among]
        return max(candidates, key=lambda pair: pair[1], default=("en", 0.0))

    def _start_rows(self, jobs: Sequence[Job]) -> None:
        """Assigns free rows to waiting texts, the oldest window first; a search waits until it has all of its rows."""
        started: list[tuple[int, Job]] = []
        for job in jobs:
            if job.beams > len(self._free_rows):
                break
            taken = [self._free_rows.pop() for _ in range(min(job.unstarted, len(self._free_rows)))]
            job.unstarted -= len(taken)
            job.rows.update(taken)
            if job.beams:
                self._runner.begin_beams(job.group, job.slot.number, job.plan)
            else:
                started += [(row, job) for row in taken]
        for at in range(0, len(started), self._encode_windows):  # reading prefixes needs workspace, as encoding does
            rows, theirs = zip(*started[at : at + self._encode_windows], strict=True)
            self._runner.begin(rows, [job.slot.number for job in theirs], [job.plan for job in theirs])

    def _write(self) -> None:
        rows = sorted(row for job in self._jobs for row in job.rows)
        if not rows:
            return
        started_s = time.monotonic()
        self._decode(rows)
        self._stage()
        done, looping = self._runner.progress(rows)
        self._meter.observe_batch(len(rows), time.monotonic() - started_s)
        texts = self._texts(done) | self._hopeless(looping)
        for job in self._jobs:
            ended = job.rows & texts.keys()
            searched = ended and job.beams
            job.texts += self._runner.beam_texts(job.group) if searched else [texts[row] for row in sorted(ended)]
            job.rows -= ended
            self._free_rows += sorted(ended)

    def _decode(self, rows: Sequence[int]) -> None:
        groups = [job.group for job in self._jobs if job.group]
        searching = {row for group in groups for row in group}
        alone = [row for row in rows if row not in searching]
        if alone:
            self._runner.decode(alone, STEPS_PER_TURN)
        for size in {len(group) for group in groups}:
            self._runner.decode_beams([group for group in groups if len(group) == size], STEPS_PER_TURN)

    def _texts(self, rows: Sequence[int]) -> dict[int, RowText]:
        return dict(zip(rows, self._runner.texts(rows), strict=True)) if rows else {}

    def _hopeless(self, looping: Sequence[int]) -> dict[int, RowText]:
        """The texts that repeat themselves and already fail the threshold: more tokens would only hold the row."""
        limits = {row: job.limit for job in self._jobs for row in job.rows}
        texts = self._texts([row for row in looping if limits[row] is not None])
        return {
            row: replace(text, looped=True)
            for row, text in texts.items()
            if compression_ratio(self.vocabulary.decode(text.tokens)) > (limits[row] or 0.0)
        }

    def _complete(self) -> list[Outcome]:
        jobs = [job for job in self._jobs if job.complete]
        if not jobs:
            return []
        best = [job.best() for job in jobs]
        times = self._aligned(jobs, best)
        for job in jobs:
            self._leave(job)
        return [job.hypothesis(text, times.get(job.window.id)) for job, text in zip(jobs, best, strict=True)]

    def _aligned(self, jobs: Sequence[Job], best: Sequence[RowText]) -> dict[int, tuple[TokenTime, ...]]:
        """Token times by window, where requested; each job has just freed a row, in which its text is read."""
        asked = [pair for pair in zip(jobs, best, strict=True) if pair[0].window.request.word_timestamps]
        times: dict[int, tuple[TokenTime, ...]] = {job.window.id: () for job, _ in asked}
        spoken = [
            (job.window.id, self._spoken(job, text, row))
            for (job, text), row in zip(asked, self._free_rows, strict=False)
        ]
        with_text = [(key, one) for key, one in spoken if one.tokens]
        for at in range(0, len(with_text), self._encode_windows):
            keys, texts = zip(*with_text[at : at + self._encode_windows], strict=True)
            times |= dict(zip(keys, self._runner.align(texts), strict=True))
        return times

    def _spoken(self, job: Job, text: RowText, row: int) -> Spoken:
        return Spoken(
            row=row,
            window=job.slot.number,
            n_samples=len(job.window.samples),
            start=tuple(self.vocabulary.start(job.window.request.task, job.language[0])),
            tokens=tuple(token for token in text.tokens if token < self.vocabulary.eot),
        )

    def _leave(self, job: Job) -> None:
        self._jobs.remove(job)
        self._free_slots.give_back(job.slot)
        self._free_rows += sorted(job.rows)


def log_progress(done: int, of: int) -> None:
    """Logs how many graphs are recorded, eight times in all."""
    if done == of or done % max(1, of // 8) == 0:
        log.info("recorded %d of %d graphs", done, of)


def _require_fp8() -> None:
    missing = fp8_obstacle(torch.cuda.get_device_capability(), hip=torch.version.hip is not None)
    if missing is not None:
        raise EngineError(f"engine.fp8_cross is set, but {missing}; set it to false")


def _opened(
    found: checkpoints.Checkpoint, vocabulary: Vocabulary, device: str, dtype: str, slots: int, *, fp8_cross: bool
) -> Runner:
    """Opens the runner; with half as many slots while the memory is not enough."""
    place, number = torch.device(device), DTYPES[dtype]
    while True:
        try:
            return Runner(
                found,
                vocabulary,
                device=place,
                dtype=number,
                slots=slots,
                fp8_cross=fp8_cross,
                progress=log_progress,
            )
        except OutOfMemory:
            if slots == 1:
                raise
            slots //= 2
            log.warning("out of memory while loading; trying %d slots", slots)


def _budget_bytes(device: str, wanted_bytes: int) -> int:
    """The free memory of the GPU, or of the host for tests, and at most ``wanted_bytes``."""
    if device == "cuda":
        free_bytes = int(torch.cuda.mem_get_info()[0])
    else:
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(wanted_bytes or free_bytes, free_bytes)
