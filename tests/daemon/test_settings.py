"""The tables of the configuration become the settings of the parts, by the names of their fields."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from whisperd.config import Config
from whisperd.daemon.settings import cut_options, decode_options, engine_settings, open_spool, server_settings
from whisperd.engine.factory import EngineSettings
from whisperd.serving.interface import Chunking, ServerSettings
from whisperd.speech.fallback import Options
from whisperd.speech.segmentation import CutOptions


@pytest.mark.parametrize(
    ("made", "by_hand"),
    [
        (engine_settings(Config()), EngineSettings()),
        (decode_options(Config()), Options()),
        (cut_options(Config(), Chunking()), CutOptions()),
        (server_settings(Config()), ServerSettings()),
    ],
    ids=["engine", "decode", "vad", "server"],
)
def test_the_defaults_are_those_of_the_options(made: object, by_hand: object) -> None:
    """Settings that are made without a configuration equal those of a configuration that sets nothing."""
    assert made == by_hand


def test_every_option_of_the_engine_arrives() -> None:
    """Each option of [engine] and of [decode] is a field of the same name."""
    engine, decode = Config().engine, Config().decode
    assert {field.name for field in fields(EngineSettings)} == set(dict(engine))
    assert {field.name for field in fields(Options)} >= set(dict(decode))
    config = Config.model_validate({"engine": {"workers": 3}, "decode": {"beam_size": 4, "prompt": "x"}})
    assert engine_settings(config) == EngineSettings(workers=3)
    assert decode_options(config) == Options(beam_size=4, prompt="x")


def test_a_request_comes_before_the_file(tmp_path: Path) -> None:
    """A request's own settings of the segmentation override the configuration's; the others are the configuration's."""
    config = Config.model_validate({"vad": {"filter": False, "threshold": 0.3}, "server": {"spool_dir": str(tmp_path)}})
    assert cut_options(config, Chunking(vad_filter=True)) == CutOptions(skip_silence=True, threshold=0.3)
    assert cut_options(config, Chunking(threshold=0.9)) == CutOptions(skip_silence=False, threshold=0.9)
    spool = open_spool(config, {})
    assert (spool.directory, spool.upload_bytes) == (tmp_path, config.limits.upload_bytes)
