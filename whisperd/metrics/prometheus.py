"""Figures for Prometheus. Home of prometheus_client.

Labels are bounded: declared models, known routes, codes of errors. Nothing says who asked, or what was said.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from whisperd.metrics.interface import HttpMeter, ModelMeter, Stage, WyomingMeter
from whisperd.speech.transcript import Transcript
from whisperd.version import VERSION

DURATION_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
WAIT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
SPEEDUP_BUCKETS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
AUDIO_BUCKETS_S = (1, 3, 10, 30, 60, 300, 600, 1800, 3600, 7200, 21_600)

REASONS = ("loop", "compression_ratio", "avg_logprob", "end_past_audio")
REJECTIONS = (
    "queue_full", "model_loading", "draining", "spool_full", "file_too_large", "audio_too_long", "audio_decode_error",
    "invalid_value", "model_not_found", "engine_error", "out_of_memory",
    "deadline_exceeded", "malformed_request", "headers_too_long",
)  # fmt: skip
RECONCILED = ("ok", "unchecked", "failed", "cancelled")
OUTCOMES = ("decoded", "retried", "dropped", "continued")
STAGES: tuple[Stage, ...] = ("load", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """A declared model as it is now."""

    name: str
    revision: str = ""
    device: str = ""
    compute_type: str = ""
    loaded: bool = False
    fallback: bool = False
    waiting: int = 0
    running: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What is true at the moment of a scrape."""

    ready: bool
    draining: bool
    requests: int
    queue_audio_s: float
    spool_bytes: int
    spool_files: int
    models: Sequence[ModelFigures] = ()


class Metrics(HttpMeter, WyomingMeter):
    """All counters of one daemon; every method may be called from any thread."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._declare_http()
        self._declare_wyoming()
        self._declare_work()
        self._declare_windows()
        self._declare_daemon()
        self._declare_store()
        info = Gauge("whisperd_build_info", "Always 1.", ["version", "python"], registry=self._registry)
        info.labels(VERSION, platform.python_version()).set(1)

    def model(self, name: str) -> ModelMeter:
        """Counts for one model."""
        return _ModelMetrics(self, name)

    def answered(self, route: str, method: str, status: int, duration_s: float) -> None:
        """A request is over."""
        self._http.labels(route, method, str(status)).inc()
        self._http_duration.labels(route).observe(duration_s)

    def rejected(self, code: str) -> None:
        """A request got an error of this code."""
        if code == "cancelled":
            self._cancelled.inc()
        else:
            self._rejected.labels(code).inc()

    def spoken(self, result: str, latency_s: float) -> None:
        """An utterance over the Wyoming protocol is over."""
        self._spoken.labels(result).inc()
        if result == "ok":
            self._spoken_latency.observe(latency_s)
        else:
            self.rejected(result)

    def first_segment(self, model: str, wait_s: float) -> None:
        """The first words of a request are there."""
        self._first_segment.labels(model).observe(wait_s)

    def transcribed(self, model: str, transcript: Transcript, wall_s: float) -> None:
        """A request is done."""
        self._audio.labels(model, transcript.task).inc(transcript.duration_s)
        self._request_audio.labels(model).observe(transcript.duration_s)
        self._speedup.labels(model).observe(transcript.duration_s / max(wall_s, 1e-3))
        self._segments.labels(model).inc(len(transcript.segments))
        self._tokens.labels(model).inc(sum(len(segment.tokens) for segment in transcript.segments))
        for outcome in OUTCOMES:
            self.windows.labels(model, outcome).inc(getattr(transcript.windows, outcome))

    def loaded(self, model: str, took_s: float, *, again: bool) -> None:
        """A model was loaded; ``again`` because its engine had died."""
        self._load_s.labels(model).set(took_s)
        if again:
            self.restarts.labels(model).inc()

    def reloaded(self, *, ok: bool) -> None:
        """The configuration was read again."""
        self._reloads.labels("ok" if ok else "failed").inc()
        self._reload_ok.set(ok)
        if ok:
            self._reload_ok_at.set(time.time())

    def reconciled(self, result: str, wall_s: float, fetched_bytes: Mapping[str, int] = MappingProxyType({})) -> None:
        """A reconcile is over: one of RECONCILED, with the bytes of the models that have arrived."""
        self._reconciles.labels(result).inc()
        self._reconcile_duration.observe(wall_s)
        if result != "cancelled":  # by somebody who knows
            self._reconcile_ok.set(result == "ok")
        if result == "ok":
            self._reconcile_ok_at.set(time.time())
        for model, n_bytes in fetched_bytes.items():
            self._downloaded.labels(model).inc(n_bytes)

    def render(self, accept: str, figures: Figures) -> tuple[bytes, str]:
        """The exposition and its content type, in what the scraper accepts."""
        from prometheus_client.exposition import choose_encoder

        self._set(figures)
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _declare_http(self) -> None:
        from prometheus_client import Counter, Histogram

        registry = self._registry
        self._http = Counter(
            "whisperd_http_requests", "HTTP requests answered.", ["route", "method", "status"], registry=registry
        )
        self._http_duration = Histogram(
            "whisperd_http_request_duration_seconds",
            "From the head of a request to the end of its answer.",
            ["route"],
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self._rejected = Counter(
            "whisperd_requests_rejected", "Requests that got an error, by its code.", ["reason"], registry=registry
        )
        for reason in REJECTIONS:
            self._rejected.labels(reason)
        self._cancelled = Counter("whisperd_requests_cancelled", "Requests whose client went away.", registry=registry)

    def _declare_wyoming(self) -> None:
        from prometheus_client import Counter, Histogram

        self._spoken = Counter(
            "whisperd_wyoming_requests",
            "Utterances over the Wyoming protocol, by how they ended.",
            ["result"],
            registry=self._registry,
        )
        self._spoken.labels("ok")
        self._spoken_latency = Histogram(
            "whisperd_wyoming_latency_seconds",
            "From the end of an utterance to its transcript.",
            buckets=DURATION_BUCKETS_S,
            registry=self._registry,
        )

    def _declare_work(self) -> None:
        from prometheus_client import Counter, Histogram

        registry, model = self._registry, ["model"]
        self._audio = Counter("whisperd_audio_seconds", "Audio transcribed.", ["model", "task"], registry=registry)
        self._segments = Counter("whisperd_segments", "Segments written.", model, registry=registry)
        self._tokens = Counter("whisperd_tokens_generated", "Tokens in those segments.", model, registry=registry)
        self._request_audio = Histogram(
            "whisperd_request_audio_duration_seconds",
            "Audio of a request.",
            model,
            buckets=AUDIO_BUCKETS_S,
            registry=registry,
        )
        self._speedup = Histogram(
            "whisperd_realtime_factor",
            "Audio seconds of a request over its wall seconds.",
            model,
            buckets=SPEEDUP_BUCKETS,
            registry=registry,
        )
        self._first_segment = Histogram(
            "whisperd_time_to_first_segment_seconds",
            "From the whole upload to the first segment.",
            model,
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )

    def _declare_windows(self) -> None:
        from prometheus_client import Counter, Histogram

        registry, model = self._registry, ["model"]
        self.windows = Counter(
            "whisperd_windows", "Windows of finished requests.", ["model", "outcome"], registry=registry
        )
        self.fallback = Counter(
            "whisperd_fallback",
            "Windows that failed a safeguard and were decoded again.",
            ["model", "reason"],
            registry=registry,
        )
        self.oom = Counter(
            "whisperd_oom", "Batches halved because memory was short.", ["model", "stage"], registry=registry
        )
        self.wait = Histogram(
            "whisperd_queue_wait_seconds",
            "How long a window waited for its slot.",
            model,
            buckets=WAIT_BUCKETS_S,
            registry=registry,
        )
        self.batch_size = Histogram(
            "whisperd_batch_size", "Windows of a batch.", model, buckets=BATCH_BUCKETS, registry=registry
        )
        self.batch_duration = Histogram(
            "whisperd_batch_duration_seconds",
            "How long a batch took.",
            model,
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self.died = Counter("whisperd_engine_failures", "Engines that stopped by themselves.", model, registry=registry)
        self.restarts = Counter(
            "whisperd_engine_restarts", "Engines opened anew after one had died.", model, registry=registry
        )

    def _declare_daemon(self) -> None:
        from prometheus_client import Counter, Gauge

        registry = self._registry

        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(f"whisperd_{name}", text, labels, registry=registry)

        self._ready = gauge("ready", "1 when a request sent now would be served.")
        self._draining = gauge("draining", "1 while the daemon stops.")
        self._in_flight = gauge("requests_in_flight", "Transcriptions that arrive, wait or run.")
        self._queue_audio = gauge("queue_audio_seconds", "Audio of theirs that is not transcribed yet.")
        self._spool_bytes = gauge("spool_bytes", "Uploads on disk.")
        self._spool_files = gauge("spool_files", "Uploads on disk.")
        self._waiting = gauge("windows_waiting", "Windows that wait for a slot.", ["model"])
        self._running = gauge("windows_running", "Windows in the engine.", ["model"])
        self._loaded = gauge("model_loaded", "1 when the model is in memory.", ["model", "device", "compute_type"])
        self._fallback = gauge("model_fallback", "1 while the cpu serves in place of a lost GPU.", ["model"])
        self._memory = gauge("model_memory_bytes", "What the model is counted as in limits.model_bytes.", ["model"])
        self._load_s = gauge("model_load_seconds", "How long the last load took.", ["model"])
        self._reload_ok = gauge("config_last_reload_successful", "0 when the last reload failed.")
        self._reload_ok.set(1)
        self._reload_ok_at = gauge("config_last_reload_success_timestamp_seconds", "When a reload last succeeded.")
        self._reload_ok_at.set(time.time())
        self._reloads = Counter("whisperd_config_reloads", "Reloads.", ["result"], registry=registry)
        for result in ("ok", "failed"):
            self._reloads.labels(result)

    def _declare_store(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        registry = self._registry
        self._reconciles = Counter(
            "whisperd_reconcile_runs",
            "Reconciles of boots, reloads and orders; unchecked: served, but the Hub could not be asked.",
            ["result"],
            registry=registry,
        )
        for result in RECONCILED:
            self._reconciles.labels(result)
        self._reconcile_duration = Histogram(
            "whisperd_reconcile_duration_seconds",
            "How long a reconcile took.",
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self._reconcile_ok = Gauge(
            "whisperd_reconcile_last_run_successful", "0 when the last reconcile was not ok.", registry=registry
        )
        self._reconcile_ok_at = Gauge(
            "whisperd_reconcile_last_success_timestamp_seconds", "When a reconcile was last ok.", registry=registry
        )
        self._downloaded = Counter(
            "whisperd_model_download_bytes", "Fetched of models that arrived whole.", ["model"], registry=registry
        )
        self._info = Gauge("whisperd_model_info", "Always 1.", ["model", "revision"], registry=registry)

    def _set(self, figures: Figures) -> None:
        self._ready.set(figures.ready)
        self._draining.set(figures.draining)
        self._in_flight.set(figures.requests)
        self._queue_audio.set(figures.queue_audio_s)
        self._spool_bytes.set(figures.spool_bytes)
        self._spool_files.set(figures.spool_files)
        for family in (self._waiting, self._running, self._loaded, self._fallback, self._memory, self._info):
            family.clear()
        for model in figures.models:
            self._info.labels(model.name, model.revision).set(1)
            self._waiting.labels(model.name).set(model.waiting)
            self._running.labels(model.name).set(model.running)
            self._loaded.labels(model.name, model.device, model.compute_type).set(model.loaded)
            self._fallback.labels(model.name).set(model.fallback)
            self._memory.labels(model.name).set(model.memory_bytes)


class _ModelMetrics(ModelMeter):
    def __init__(self, metrics: Metrics, model: str) -> None:
        self._fallback = {reason: metrics.fallback.labels(model, reason) for reason in REASONS}
        self._oom = {stage: metrics.oom.labels(model, stage) for stage in STAGES}
        self._wait = metrics.wait.labels(model)
        self._batch_size = metrics.batch_size.labels(model)
        self._batch_duration = metrics.batch_duration.labels(model)
        self._died = metrics.died.labels(model)
        self._restarts = metrics.restarts.labels(model)
        for outcome in OUTCOMES:
            metrics.windows.labels(model, outcome)

    def waited(self, duration_s: float) -> None:
        self._wait.observe(duration_s)

    def batch(self, n_windows: int, duration_s: float) -> None:
        self._batch_size.observe(n_windows)
        self._batch_duration.observe(duration_s)

    def halved(self, stage: Stage) -> None:
        self._oom[stage].inc()

    def fallback(self, reason: str) -> None:
        self._fallback[reason].inc()

    def engine_died(self) -> None:
        self._died.inc()

    def engine_restarted(self) -> None:
        self._restarts.inc()
