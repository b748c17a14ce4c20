"""Figures for Prometheus, declared in one table. Home of prometheus_client, which is imported late.

Labels are bounded: declared models, known routes, codes of errors. None names a client or holds what was said.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from whisperd.metrics import HttpMeter, ModelMeter, Stage, WyomingMeter
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


class Family(NamedTuple):
    """One row of the table.

    ``known`` lists values of the last label that are exposed as 0 before their first event. ``name`` has neither the
    prefix ``whisperd_`` nor the suffix ``_total`` of a counter.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    known: tuple[str, ...] = ()


MODEL = ("model",)
# fmt: off
FAMILIES = (
    Family("build_info", "gauge", "Always 1.", ("version", "python")),
    # HTTP
    Family("http_requests", "counter", "HTTP requests answered.", ("route", "method", "status")),
    Family("http_request_duration_seconds", "histogram", "From the head of a request to the end of its answer.",
           ("route",), DURATION_BUCKETS_S),
    Family("requests_rejected", "counter", "Requests that got an error, by its code.", ("reason",), known=REJECTIONS),
    Family("requests_cancelled", "counter", "Requests whose client went away."),
    # Wyoming
    Family("wyoming_requests", "counter", "Utterances over the Wyoming protocol, by how they ended.", ("result",),
           known=("ok",)),
    Family("wyoming_latency_seconds", "histogram", "From the end of an utterance to its transcript.", (),
           DURATION_BUCKETS_S),
    # transcriptions
    Family("audio_seconds", "counter", "Audio transcribed.", ("model", "task")),
    Family("segments", "counter", "Segments written.", MODEL),
    Family("tokens_generated", "counter", "Tokens in those segments.", MODEL),
    Family("request_audio_duration_seconds", "histogram", "Audio of a request.", MODEL, AUDIO_BUCKETS_S),
    Family("realtime_factor", "histogram", "Audio seconds of a request over its wall seconds.", MODEL, SPEEDUP_BUCKETS),
    Family("time_to_first_segment_seconds", "histogram", "From the whole upload to the first segment.", MODEL,
           DURATION_BUCKETS_S),
    # windows and engines
    Family("windows", "counter", "Windows of finished requests.", ("model", "outcome"), known=OUTCOMES),
    Family("fallback", "counter", "Windows that failed a safeguard and were decoded again.", ("model", "reason"),
           known=REASONS),
    Family("oom", "counter", "Batches halved because memory was short.", ("model", "stage"), known=STAGES),
    Family("queue_wait_seconds", "histogram", "How long a window waited for its slot.", MODEL, WAIT_BUCKETS_S),
    Family("batch_size", "histogram", "Windows of a batch.", MODEL, BATCH_BUCKETS),
    Family("batch_duration_seconds", "histogram", "How long a batch took.", MODEL, DURATION_BUCKETS_S),
    Family("engine_failures", "counter", "Engines that stopped because of an error.", MODEL),
    Family("engine_restarts", "counter", "Engines opened in place of one that failed.", MODEL),
    # the daemon now
    Family("ready", "gauge", "1 when a request sent now would be served."),
    Family("draining", "gauge", "1 while the daemon stops."),
    Family("requests_in_flight", "gauge", "Transcriptions that arrive, wait or run."),
    Family("queue_audio_seconds", "gauge", "Audio of theirs that is not transcribed yet."),
    Family("spool_bytes", "gauge", "Uploads on disk, in bytes."),
    Family("spool_files", "gauge", "Uploads on disk."),
    # each declared model now
    Family("model_info", "gauge", "Always 1.", ("model", "revision")),
    Family("windows_waiting", "gauge", "Windows that wait for a slot.", MODEL),
    Family("windows_running", "gauge", "Windows in the engine.", MODEL),
    Family("model_loaded", "gauge", "1 when the model is in memory.", ("model", "device", "compute_type")),
    Family("model_fallback", "gauge", "1 while the cpu serves in place of a lost GPU.", MODEL),
    Family("model_memory_bytes", "gauge", "What the model is counted as in limits.model_bytes.", MODEL),
    Family("model_load_seconds", "gauge", "How long the last load took.", MODEL),
    # configuration
    Family("config_reloads", "counter", "Reloads.", ("result",), known=("ok", "failed")),
    Family("config_last_reload_successful", "gauge", "0 when the last reload failed."),
    Family("config_last_reload_success_timestamp_seconds", "gauge", "When a reload last succeeded."),
    # the cache
    Family("reconcile_runs", "counter",
           "Reconciles of boots, reloads and orders; unchecked: served, but the Hub could not be asked.",
           ("result",), known=RECONCILED),
    Family("reconcile_duration_seconds", "histogram", "How long a reconcile took.", (), DURATION_BUCKETS_S),
    Family("reconcile_last_run_successful", "gauge", "0 when the last reconcile was not ok."),
    Family("reconcile_last_success_timestamp_seconds", "gauge", "When a reconcile was last ok."),
    Family("model_download_bytes", "counter", "Fetched of models that arrived whole.", MODEL),
)
# fmt: on
OF_MODELS = tuple(family for family in FAMILIES if family.kind != "gauge" and family.labels[:1] == MODEL)
NOW = ("model_info", "windows_waiting", "windows_running", "model_loaded", "model_fallback", "model_memory_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """A declared model at the moment of a scrape."""

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
    """The daemon at the moment of a scrape."""

    ready: bool
    draining: bool
    requests: int
    queue_audio_s: float
    spool_bytes: int
    spool_files: int
    models: Sequence[ModelFigures] = ()


class _Table:
    """The families of FAMILIES by name, in a registry of their own."""

    def __init__(self) -> None:
        import prometheus_client as library

        self._registry = library.CollectorRegistry()
        self._choose_encoder = library.exposition.choose_encoder
        library.ProcessCollector(registry=self._registry)
        kinds = {"counter": library.Counter, "gauge": library.Gauge, "histogram": library.Histogram}
        self._families: dict[str, Any] = {}
        for family in FAMILIES:
            options = {"buckets": family.buckets} if family.buckets else {}
            made = kinds[family.kind](
                f"whisperd_{family.name}", family.help, family.labels, registry=self._registry, **options
            )
            self._families[family.name] = made
            if len(family.labels) == 1:
                self.expose(family)

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """Adds to a counter."""
        self._of(name, labels).inc(by)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Adds a value to a histogram."""
        self._of(name, labels).observe(value)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Sets a gauge."""
        self._of(name, labels).set(value)

    def clear(self, name: str) -> None:
        """Removes all series of a family."""
        self._families[name].clear()

    def expose(self, family: Family, *labels: str) -> None:
        """Exposes the known series of a family as 0."""
        metric = self._families[family.name]
        if len(family.labels) == len(labels):
            metric.labels(*labels)
            return
        for value in family.known:
            metric.labels(*labels, value)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type."""
        encode, content_type = self._choose_encoder(accept)
        return encode(self._registry), content_type

    def _of(self, name: str, labels: tuple[str, ...]) -> Any:
        family = self._families[name]
        return family.labels(*labels) if labels else family


class Metrics(HttpMeter, WyomingMeter):
    """All figures of one daemon; every method may be called from any thread."""

    def __init__(self) -> None:
        self._table = _Table()
        self._table.set("build_info", 1, VERSION, platform.python_version())
        self._table.set("config_last_reload_successful", 1)
        self._table.set("config_last_reload_success_timestamp_seconds", time.time())

    def model(self, name: str) -> ModelMeter:
        """The meter of one model."""
        for family in OF_MODELS:
            self._table.expose(family, name)
        return _ModelMetrics(self._table, name)

    def observe_request(self, route: str, method: str, status: int, duration_s: float) -> None:
        """A request was answered ``duration_s`` after its head had arrived."""
        self._table.count("http_requests", route, method, str(status))
        self._table.observe("http_request_duration_seconds", duration_s, route)

    def count_rejection(self, code: str) -> None:
        """A request was answered with the error of this code."""
        if code == "cancelled":
            self._table.count("requests_cancelled")
        else:
            self._table.count("requests_rejected", code)

    def observe_utterance(self, result: str, latency_s: float) -> None:
        """An utterance was answered: ``ok`` or the code of an error, ``latency_s`` after the end of its audio."""
        self._table.count("wyoming_requests", result)
        if result == "ok":
            self._table.observe("wyoming_latency_seconds", latency_s)
        else:
            self.count_rejection(result)

    def observe_first_segment(self, model: str, wait_s: float) -> None:
        """The first segment of a request came ``wait_s`` after its upload."""
        self._table.observe("time_to_first_segment_seconds", wait_s, model)

    def observe_transcript(self, model: str, transcript: Transcript, wall_s: float) -> None:
        """A request was transcribed in ``wall_s``."""
        self._table.count("audio_seconds", model, transcript.task, by=transcript.duration_s)
        self._table.observe("request_audio_duration_seconds", transcript.duration_s, model)
        self._table.observe("realtime_factor", transcript.duration_s / max(wall_s, 1e-3), model)
        self._table.count("segments", model, by=len(transcript.segments))
        self._table.count("tokens_generated", model, by=sum(len(segment.tokens) for segment in transcript.segments))
        for outcome in OUTCOMES:
            self._table.count("windows", model, outcome, by=getattr(transcript.windows, outcome))

    def observe_load(self, model: str, took_s: float, *, again: bool) -> None:
        """A model was loaded in ``took_s``; ``again`` because its engine had failed."""
        self._table.set("model_load_seconds", took_s, model)
        if again:
            self._table.count("engine_restarts", model)

    def count_reload(self, *, ok: bool) -> None:
        """The configuration was read again."""
        self._table.count("config_reloads", "ok" if ok else "failed")
        self._table.set("config_last_reload_successful", ok)
        if ok:
            self._table.set("config_last_reload_success_timestamp_seconds", time.time())

    def observe_reconcile(
        self, result: str, wall_s: float, fetched_bytes: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        """A reconcile ended with one of RECONCILED; ``fetched_bytes`` of each model that arrived whole."""
        self._table.count("reconcile_runs", result)
        self._table.observe("reconcile_duration_seconds", wall_s)
        if result != "cancelled":  # which says nothing about the cache
            self._table.set("reconcile_last_run_successful", result == "ok")
        if result == "ok":
            self._table.set("reconcile_last_success_timestamp_seconds", time.time())
        for model, n_bytes in fetched_bytes.items():
            self._table.count("model_download_bytes", model, by=n_bytes)

    def render(self, accept: str, figures: Figures) -> tuple[bytes, str]:
        """The exposition and its content type, chosen by the scraper's Accept header."""
        self._set_figures(figures)
        return self._table.render(accept)

    def _set_figures(self, figures: Figures) -> None:
        self._table.set("ready", figures.ready)
        self._table.set("draining", figures.draining)
        self._table.set("requests_in_flight", figures.requests)
        self._table.set("queue_audio_seconds", figures.queue_audio_s)
        self._table.set("spool_bytes", figures.spool_bytes)
        self._table.set("spool_files", figures.spool_files)
        for name in NOW:
            self._table.clear(name)
        for model in figures.models:
            self._table.set("model_info", 1, model.name, model.revision)
            self._table.set("windows_waiting", model.waiting, model.name)
            self._table.set("windows_running", model.running, model.name)
            self._table.set("model_loaded", model.loaded, model.name, model.device, model.compute_type)
            self._table.set("model_fallback", model.fallback, model.name)
            self._table.set("model_memory_bytes", model.memory_bytes, model.name)


class _ModelMetrics(ModelMeter):
    def __init__(self, table: _Table, model: str) -> None:
        self._table = table
        self._model = model

    def observe_wait(self, duration_s: float) -> None:
        self._table.observe("queue_wait_seconds", duration_s, self._model)

    def observe_batch(self, n_windows: int, duration_s: float) -> None:
        self._table.observe("batch_size", n_windows, self._model)
        self._table.observe("batch_duration_seconds", duration_s, self._model)

    def count_halving(self, stage: Stage) -> None:
        self._table.count("oom", self._model, stage)

    def count_fallback(self, reason: str) -> None:
        self._table.count("fallback", self._model, reason)

    def count_engine_failure(self) -> None:
        self._table.count("engine_failures", self._model)

    def count_engine_restart(self) -> None:
        self._table.count("engine_restarts", self._model)
