"""Who hears how a transcription goes on."""

from __future__ import annotations

import time

from whisperd.metrics.prometheus import Metrics
from whisperd.serving.interface import Job
from whisperd.speech.transcript import Segment
from whisperd.transcription.request import Listener


class Hearer:
    """Tells the client of a job, the backlog and the metrics; on the job's thread.

    ``silent`` until the client has heard of a segment.
    """

    def __init__(self, job: Job, queue_audio_s: float, metrics: Metrics, model: str) -> None:
        self._job = job
        self._queue_audio_s = queue_audio_s
        self._metrics = metrics
        self._model = model
        self._started_s = time.monotonic()
        self.silent = True

    @property
    def wall_s(self) -> float:
        """Time since the upload was complete."""
        return time.monotonic() - self._started_s

    def listener(self) -> Listener:
        """What the pipeline calls."""
        return Listener(on_length=self._length, on_segment=self._segment, on_progress=self._progress)

    def _length(self, total_s: float) -> None:
        self._job.admission.announce(total_s, self._queue_audio_s)

    def _segment(self, segment: Segment) -> None:
        if self.silent:
            self.silent = False
            self._metrics.observe_first_segment(self._model, self.wall_s)
        self._job.on_segment(segment)

    def _progress(self, done_s: float, total_s: float | None) -> None:
        self._job.admission.progress(done_s)
        self._job.on_progress(done_s, total_s)
