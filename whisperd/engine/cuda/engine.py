"""The engine on PyTorch: windows join whenever a slot is free, and leave as soon as their text is complete."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from whisperd.engine import checkpoint as checkpoints
from whisperd.engine.base import DecodeRequest, EngineInfo, Hypothesis, Outcome, TokenTime, Window, WindowFailure
from whisperd.engine.cuda import memory
from whisperd.engine.cuda.rows import RowPlan, RowText
from whisperd.engine.cuda.runner import Runner, Spoken
from whisperd.errors import EngineError, OutOfMemory
from whisperd.meter import ModelMeter
from whisperd.tokens import Vocabulary

log = logging.getLogger(__name__)

STEPS_PER_TURN = 4  # tokens of each row between two looks at what is complete: a row wastes less than that many
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(slots=True, kw_only=True)
class _Job:
    """One window inside the engine. ``unstarted`` texts still wait for a row; ``texts`` are complete."""

    window: Window
    slot: int
    language: tuple[str, float] = ("en", 1.0)
    plan: RowPlan = field(default_factory=lambda: RowPlan(prefix=()))
    unstarted: int = 0
    rows: set[int] = field(default_factory=set)
    texts: list[RowText] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not self.unstarted and not self.rows


class CudaEngine:
    """One loaded model behind the contract of ``whisperd.engine.base``; ``load`` opens it."""

    def __init__(
        self, runner: Runner, vocabulary: Vocabulary, *, compute_type: str, meter: ModelMeter | None = None
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
            slots=runner.slots,
        )
        self._waiting: list[Window] = []
        self._refused: list[Window] = []
        self._jobs: list[_Job] = []
        self._free_slots = list(range(runner.slots))
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
        meter: ModelMeter | None = None,
    ) -> CudaEngine:
        """Opens a snapshot in either format.

        Args:
            path: directory with ``model.bin`` or safetensors.
            vocabulary: its tokens.
            device: ``cuda``, or ``cpu`` for tests.
            compute_type: float16, bfloat16 or float32; auto is float16 on a GPU.
            slots: windows at the same time; 0: as many as the memory holds.
            budget_bytes: memory that it may take; 0: what is free.
            meter: told what happens.

        Raises:
            SourceError: the snapshot is no whole Whisper.
            OutOfMemory: not even one window fits.
            EngineError: the compute type is unknown here.
        """
        name = ("float32" if device == "cpu" else "float16") if compute_type == "auto" else compute_type
        if name not in DTYPES:
            raise EngineError(
                f"engine.compute_type {name!r} is for the cpu; on a GPU it is one of auto, {', '.join(DTYPES)}"
            )
        found = checkpoints.read(path)
        wanted = slots or memory.slots(found.shape, DTYPES[name].itemsize, _budget_bytes(device, budget_bytes))
        return cls(_opened(found, vocabulary, device, name, wanted), vocabulary, compute_type=name, meter=meter)

    @property
    def info(self) -> EngineInfo:
        """Constant facts about the loaded model."""
        return self._info

    @property
    def free_slots(self) -> int:
        """How many more windows ``admit`` takes now."""
        return self._info.slots - len(self._refused) - len(self._waiting) - len(self._jobs)

    def admit(self, windows: Sequence[Window]) -> None:
        """Queues windows; the next steps encode them. Windows that ask for beams come back as failures."""
        for window in windows:
            (self._refused if _asks_for_beams(window.request) else self._waiting).append(window)

    def step(self) -> Sequence[Outcome]:
        """Lets waiting windows in, writes a few tokens in every row, and returns the windows that are complete."""
        outcomes = [*self._refusals(), *self._let_in()]
        self._start_rows([job for job in self._jobs if job.unstarted])
        self._write()
        return [*outcomes, *self._complete()]

    def cancel(self, window_ids: frozenset[int]) -> None:
        """Forgets windows at once."""
        self._waiting = [window for window in self._waiting if window.id not in window_ids]
        self._refused = [window for window in self._refused if window.id not in window_ids]
        for job in [job for job in self._jobs if job.window.id in window_ids]:
            self._leave(job)

    def close(self) -> None:
        """Gives all memory of the device back."""
        self._waiting.clear()
        self._jobs.clear()
        self._runner.close()

    def plan(self, window: Window, language: str) -> RowPlan:
        """How a window is to be written; benchmarks force lengths here."""
        request = window.request
        prefix = self.vocabulary.prefix(request.task, language, request.prompt_tokens)
        n_start = len(self.vocabulary.start(request.task, language))
        return RowPlan(prefix=tuple(prefix), start_at=len(prefix) - n_start, temperature=request.temperature)

    def _refusals(self) -> list[Outcome]:
        refused, self._refused = self._refused, []
        error = EngineError("this engine reads greedily or by sampling: decode.beam_size must be 1")
        return [WindowFailure(window_id=window.id, error=error) for window in refused]

    def _let_in(self) -> list[Outcome]:
        """Encodes the next windows; where the memory is not enough, half as many, from now on."""
        count = min(len(self._waiting), len(self._free_slots), len(self._free_rows), self._encode_windows)
        windows = self._taken(count)
        try:
            self._encode(windows)
        except OutOfMemory as error:
            if count == 1:
                return [WindowFailure(window_id=windows[0].id, error=error)]
            self._encode_windows = count // 2
            log.warning("out of memory with %d windows to encode; trying %d", count, self._encode_windows)
            self._meter.halved("decode")
            self._waiting = [*windows, *self._waiting]
        return []

    def _taken(self, count: int) -> list[Window]:
        """Those that somebody waits for, but the oldest first of all: nobody is passed over for ever."""
        ranks = [(place > 0, window.lane != "interactive") for place, window in enumerate(self._waiting)]
        places = sorted(range(len(ranks)), key=ranks.__getitem__)[:count]
        taken = [self._waiting[place] for place in places]
        self._waiting = [window for place, window in enumerate(self._waiting) if place not in places]
        return taken

    def _encode(self, windows: Sequence[Window]) -> None:
        if not windows:
            return
        slots = self._free_slots[: len(windows)]
        self._runner.encode([window.samples for window in windows], slots)
        jobs = [_Job(window=window, slot=slot) for window, slot in zip(windows, slots, strict=True)]
        self._find_languages(jobs)
        del self._free_slots[: len(windows)]
        for job in jobs:
            request = job.window.request
            job.plan = self.plan(job.window, job.language[0])
            job.unstarted = request.best_of if request.temperature > 0 else 1
        self._jobs += jobs

    def _find_languages(self, jobs: Sequence[_Job]) -> None:
        """Takes the language that was asked for, or asks the model; each question needs a row for a moment."""
        asked = [job for job in jobs if job.window.request.language is not None]
        for job in asked:
            job.language = (job.window.request.language or "", 1.0)
        unknown = [job for job in jobs if job.window.request.language is None]
        if not self.vocabulary.multilingual:
            for job in jobs:
                job.language = ("en", 1.0)
        elif unknown:
            rows = self._free_rows[: len(unknown)]
            found = self._runner.detect([job.slot for job in unknown], rows, tuple(self.vocabulary.languages.values()))
            for job, probabilities in zip(unknown, found, strict=True):
                job.language = self._likeliest(probabilities, job.window.request.languages)

    def _likeliest(self, probabilities: Sequence[float], among: Sequence[str]) -> tuple[str, float]:
        known = zip(self.vocabulary.languages, probabilities, strict=True)
        candidates = [(code, probability) for code, probability in known if not among or code in among]
        return max(candidates, key=lambda pair: pair[1], default=("en", 0.0))

    def _start_rows(self, jobs: Sequence[_Job]) -> None:
        """Gives free rows to texts that wait for one, the oldest window first."""
        started: list[tuple[int, _Job]] = []
        for job in jobs:
            while job.unstarted and self._free_rows:
                row = self._free_rows.pop()
                job.unstarted -= 1
                job.rows.add(row)
                started.append((row, job))
        for at in range(0, len(started), self._encode_windows):  # prefixes need workspace, as audio does
            rows, theirs = zip(*started[at : at + self._encode_windows], strict=True)
            self._runner.begin(rows, [job.slot for job in theirs], [job.plan for job in theirs])

    def _write(self) -> None:
        rows = sorted(row for job in self._jobs for row in job.rows)
        if not rows:
            return
        started_s = time.monotonic()
        self._runner.decode(rows, STEPS_PER_TURN)
        done = self._runner.done(rows)
        self._meter.batch(len(rows), time.monotonic() - started_s)
        texts = dict(zip(done, self._runner.texts(done), strict=True)) if done else {}
        for job in self._jobs:
            ended = job.rows & texts.keys()
            job.texts += [texts[row] for row in sorted(ended)]
            job.rows -= ended
            self._free_rows += sorted(ended)

    def _complete(self) -> list[Outcome]:
        jobs = [job for job in self._jobs if job.complete]
        if not jobs:
            return []
        best = [max(job.texts, key=_avg_logprob) for job in jobs]
        times = self._aligned(jobs, best)
        for job in jobs:
            self._leave(job)
        return [_hypothesis(job, text, times.get(job.window.id)) for job, text in zip(jobs, best, strict=True)]

    def _aligned(self, jobs: Sequence[_Job], best: Sequence[RowText]) -> dict[int, tuple[TokenTime, ...]]:
        """Token times by window, for those that asked. Each job has just given back a row, which is read into."""
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

    def _spoken(self, job: _Job, text: RowText, row: int) -> Spoken:
        return Spoken(
            row=row,
            window=job.slot,
            n_samples=len(job.window.samples),
            start=tuple(self.vocabulary.start(job.window.request.task, job.language[0])),
            tokens=tuple(token for token in text.tokens if token < self.vocabulary.eot),
        )

    def _leave(self, job: _Job) -> None:
        self._jobs.remove(job)
        self._free_slots.append(job.slot)
        self._free_rows += sorted(job.rows)


def _opened(found: checkpoints.Checkpoint, vocabulary: Vocabulary, device: str, dtype: str, slots: int) -> Runner:
    """Half as many slots where the memory, whoever used it meanwhile, holds no more."""
    while True:
        try:
            return Runner(found, vocabulary, device=torch.device(device), dtype=DTYPES[dtype], slots=slots)
        except OutOfMemory:
            if slots == 1:
                raise
            slots //= 2
            log.warning("out of memory while loading; trying %d slots", slots)


def _budget_bytes(device: str, wanted_bytes: int) -> int:
    """What may be used of the memory that nobody uses: of the GPU, or of the host for tests."""
    if device == "cuda":
        free_bytes = int(torch.cuda.mem_get_info()[0])
    else:
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(wanted_bytes or free_bytes, free_bytes)


def _asks_for_beams(request: DecodeRequest) -> bool:
    return request.temperature == 0 and request.beam_size > 1


def _avg_logprob(text: RowText) -> float:
    return text.sum_logprob / (len(text.tokens) + 1)


def _hypothesis(job: _Job, text: RowText, times: tuple[TokenTime, ...] | None) -> Hypothesis:
    return Hypothesis(
        window_id=job.window.id,
        language=job.language[0],
        language_probability=job.language[1],
        tokens=text.tokens,
        avg_logprob=_avg_logprob(text),
        no_speech_prob=text.no_speech_prob,
        temperature=job.window.request.temperature,
        alignment=times,
    )
