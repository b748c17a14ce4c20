"""The metrics for Prometheus and their users: exposition, alert rules, dashboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.support.service_fake import TRANSCRIPT
from whisperd.metrics.prometheus import FAMILIES, Figures, Metrics, ModelFigures

PACKAGING = Path(__file__).parent.parent / "packaging"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
FIGURES = Figures(
    ready=True,
    draining=False,
    requests=2,
    queue_audio_s=90.5,
    spool_bytes=1000,
    spool_files=1,
    models=(
        ModelFigures(
            name="a/b", revision="f" * 40, device="cpu", compute_type="int8", loaded=True, waiting=3, running=4
        ),
        ModelFigures(name="c"),
    ),
)


@pytest.fixture
def metrics() -> Metrics:
    """Metrics after some events of every kind."""
    metrics = Metrics()
    model = metrics.model("a/b")
    model.observe_wait(0.02)
    model.observe_batch(4, 1.5)
    model.observe_batch(1, 0.5)
    model.count_fallback("compression_ratio")
    model.count_halving("decode")
    model.count_engine_failure()
    metrics.observe_request("/v1/audio/transcriptions", "POST", 200, 2.0)
    metrics.count_rejection("queue_full")
    metrics.count_rejection("cancelled")
    metrics.observe_first_segment("a/b", 0.4)
    metrics.observe_transcript("a/b", TRANSCRIPT, 0.5)
    metrics.observe_load("a/b", 1.5, again=True)
    metrics.count_reload(ok=False)
    metrics.observe_utterance("ok", 0.4)
    metrics.observe_utterance("queue_full", 0.0)
    metrics.observe_reconcile("ok", 2.0, {"a/b": 1000})
    metrics.observe_reconcile("failed", 1.0)
    return metrics


def values(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels, sorted."""
    text = metrics.render("", FIGURES)[0].decode()
    families = text_string_to_metric_families(text)
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value for family in families for sample in family.samples
    }


def test_everything_is_counted(metrics: Metrics) -> None:
    """Each event is counted in the metric that a dashboard reads."""
    found = values(metrics)
    expected = {
        ("whisperd_http_requests_total", "/v1/audio/transcriptions", "POST", "200"): 1,
        ("whisperd_http_request_duration_seconds_sum", "/v1/audio/transcriptions"): 2.0,
        ("whisperd_requests_rejected_total", "queue_full"): 2,
        ("whisperd_wyoming_requests_total", "ok"): 1,
        ("whisperd_wyoming_requests_total", "queue_full"): 1,
        ("whisperd_wyoming_latency_seconds_count",): 1,
        ("whisperd_reconcile_runs_total", "ok"): 1,
        ("whisperd_reconcile_runs_total", "failed"): 1,
        ("whisperd_reconcile_runs_total", "cancelled"): 0,
        ("whisperd_reconcile_duration_seconds_sum",): 3.0,
        ("whisperd_reconcile_last_run_successful",): 0,
        ("whisperd_model_download_bytes_total", "a/b"): 1000,
        ("whisperd_model_info", "a/b", "f" * 40): 1,
        ("whisperd_requests_rejected_total", "draining"): 0,
        ("whisperd_requests_cancelled_total",): 1,
        ("whisperd_batch_size_bucket", "a/b", "1.0"): 1,
        ("whisperd_batch_size_bucket", "a/b", "4.0"): 2,
        ("whisperd_batch_size_sum", "a/b"): 5,
        ("whisperd_batch_duration_seconds_sum", "a/b"): 2.0,
        ("whisperd_queue_wait_seconds_count", "a/b"): 1,
        ("whisperd_fallback_total", "a/b", "compression_ratio"): 1,
        ("whisperd_fallback_total", "a/b", "avg_logprob"): 0,
        ("whisperd_oom_total", "a/b", "decode"): 1,
        ("whisperd_engine_failures_total", "a/b"): 1,
        ("whisperd_engine_restarts_total", "a/b"): 1,
        ("whisperd_audio_seconds_total", "a/b", "transcribe"): 4.5,
        ("whisperd_segments_total", "a/b"): 2,
        ("whisperd_windows_total", "a/b", "decoded"): 1,
        ("whisperd_realtime_factor_bucket", "a/b", "10.0"): 1,
        ("whisperd_realtime_factor_bucket", "a/b", "5.0"): 0,
        ("whisperd_ready",): 1,
        ("whisperd_queue_audio_seconds",): 90.5,
        ("whisperd_windows_waiting", "a/b"): 3,
        ("whisperd_model_loaded", "a/b", "cpu", "int8"): 1,
        ("whisperd_config_last_reload_successful",): 0,
        ("whisperd_config_reloads_total", "failed"): 1,
    }
    assert {key: found.get((key[0], *sorted(key[1:]))) for key in expected} == expected
    assert found["process_resident_memory_bytes",] > 1e6
    assert time.time() - found["whisperd_reconcile_last_success_timestamp_seconds",] < 60


def test_every_row_of_the_table_is_exposed(metrics: Metrics) -> None:
    """Each family has a unique name, and a sample after events of every kind."""
    metrics.observe_reconcile("cancelled", 1.0)
    exposed = metrics.render("", FIGURES)[0].decode()
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        suffix = {"counter": "_total", "gauge": "", "histogram": "_count"}[family.kind]
        assert re.search(rf"^whisperd_{family.name}{suffix}[ {{]", exposed, re.MULTILINE), family.name


def test_what_a_model_counts_is_shown_before_its_first_event() -> None:
    """The counters of a model start at zero, since a rate over one that starts at one misses the first event."""
    metrics = Metrics()
    metrics.model("a/b")
    found = values(metrics)
    expected = [
        ("whisperd_fallback_total", "a/b", "loop"),
        ("whisperd_oom_total", "a/b", "load"),
        ("whisperd_engine_failures_total", "a/b"),
        ("whisperd_queue_wait_seconds_count", "a/b"),
    ]
    assert [found[key] for key in expected] == [0] * len(expected)


def test_models_that_went_away_are_gone(metrics: Metrics) -> None:
    """The gauges show the models that are declared now."""
    values(metrics)
    text = metrics.render("", Figures(ready=True, draining=False, requests=0, queue_audio_s=0, spool_bytes=0,
                                      spool_files=0))[0].decode()  # fmt: skip
    assert "whisperd_windows_waiting{" not in text
    assert "whisperd_model_loaded{" not in text


def test_openmetrics(metrics: Metrics) -> None:
    """A scraper that asks for OpenMetrics gets it, complete and parsable."""
    body, content_type = metrics.render("application/openmetrics-text; version=1.0.0", FIGURES)
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    families = parse_openmetrics(body.decode())  # type: ignore[no-untyped-call]
    assert {family.name for family in families} >= {"whisperd_ready", "whisperd_windows"}


def test_packaging_asks_for_what_there_is(metrics: Metrics) -> None:
    """Every metric that the dashboard, the rules and their tests name is exposed."""
    exposed = {name for name, *_ in values(metrics)} | {"up"}
    for path in ("grafana/whisperd.json", "prometheus/whisperd.rules.yml", "prometheus/whisperd.test.yml"):
        text = (PACKAGING / path).read_text()
        named = set(re.findall(r"\b(?:whisperd|process)_[a-z_]+(?=[\[{) \\=\"]|$)", text))
        assert len(named) > 1
        assert named - exposed == set()


def test_dashboard() -> None:
    """Panels have queries and do not overlap."""
    panels = json.loads((PACKAGING / "grafana/whisperd.json").read_text())["panels"]
    assert all(target["expr"] for panel in panels for target in panel["targets"])
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def promtool(arguments: Sequence[str], stdin: bytes = b"") -> None:
    done = subprocess.run([PROMTOOL or "", *arguments], input=stdin, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


@needs_promtool
def test_promtool_likes_the_exposition(metrics: Metrics) -> None:
    """Names, types and help texts follow Prometheus's rules."""
    promtool(["check", "metrics"], metrics.render("", FIGURES)[0])


@needs_promtool
def test_promtool_likes_the_rules() -> None:
    """The rules are valid, and alerts fire when they should."""
    promtool(["check", "config", str(PACKAGING / "prometheus/prometheus.yml")])
    promtool(["test", "rules", str(PACKAGING / "prometheus/whisperd.test.yml")])
