"""Translates the tables of the configuration to the settings of the daemon's parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from whisperd import config as declared
from whisperd.config import Config
from whisperd.engine.factory import EngineSettings
from whisperd.serving import wyoming
from whisperd.serving.interface import ApiSettings, Chunking, ServerSettings
from whisperd.serving.spool import Spool
from whisperd.speech.fallback import Options
from whisperd.speech.segmentation import CutOptions

CONVERSIONS = ".whisperd/converted"  # beside the models of the cache, where no other tool looks


def conversions_dir(config: Config, environ: Mapping[str, str]) -> Path:
    """The directory of converted checkpoints."""
    return declared.cache_dir(config, environ) / CONVERSIONS


def engine_settings(config: Config) -> EngineSettings:
    """The settings that engines are opened with."""
    return EngineSettings(**dict(config.engine))


def decode_options(config: Config) -> Options:
    """The decoding options of a request that sets none."""
    return Options(**dict(config.decode))


def cut_options(config: Config, chunking: Chunking) -> CutOptions:
    """The segmentation options; those of a request come first."""
    vad = config.vad
    return CutOptions(
        skip_silence=vad.filter if chunking.vad_filter is None else chunking.vad_filter,
        threshold=vad.threshold if chunking.threshold is None else chunking.threshold,
        min_silence_ms=vad.min_silence_ms if chunking.silence_ms is None else chunking.silence_ms,
        speech_pad_ms=vad.speech_pad_ms if chunking.padding_ms is None else chunking.padding_ms,
    )


def open_spool(config: Config, environ: Mapping[str, str]) -> Spool:
    """The spool that both front ends share."""
    limits = config.limits
    return Spool(declared.spool_dir(config, environ), upload_bytes=limits.upload_bytes, budget_bytes=limits.spool_bytes)


def api_settings(config: Config, environ: Mapping[str, str]) -> ApiSettings:
    """The settings of the HTTP interface; raises ConfigError for a key file that cannot be used."""
    return ApiSettings(
        tcp_hosts=config.server.tcp_hosts,
        tcp_key=declared.tcp_key(config, environ),
    )


def wyoming_settings(config: Config, audio_s: Callable[[], float]) -> wyoming.Settings:
    """The timeouts of the Wyoming protocol; ``audio_s`` returns the current limit of audio."""
    return wyoming.Settings(
        event_s=config.server.header_timeout_s, idle_s=config.server.idle_timeout_s, audio_s=audio_s
    )


def server_settings(config: Config) -> ServerSettings:
    """The timeouts of the HTTP server."""
    return ServerSettings(
        header_timeout_s=config.server.header_timeout_s,
        keep_alive_s=round(config.server.idle_timeout_s),
        drain_s=round(config.server.shutdown_timeout_s),
    )
