"""The configuration: its options, where their values are found, and what follows from the environment."""

from __future__ import annotations

from whisperd.config.catalog import Option, options
from whisperd.config.check import check, warnings
from whisperd.config.environment import (
    cache_dir,
    cache_dir_origin,
    endpoint,
    offline,
    socket_path,
    spool_dir,
)
from whisperd.config.load import Loaded, load
from whisperd.config.models import ModelTable
from whisperd.config.options import DEFAULT_MODEL, Config
from whisperd.config.render import Change, Effective, diff, effective, render
from whisperd.config.secrets import Token, checked_token, hide, known_secrets, tcp_key, token

__all__ = [
    "DEFAULT_MODEL",
    "Change",
    "Config",
    "Effective",
    "Loaded",
    "ModelTable",
    "Option",
    "Token",
    "cache_dir",
    "cache_dir_origin",
    "check",
    "checked_token",
    "diff",
    "effective",
    "endpoint",
    "hide",
    "known_secrets",
    "load",
    "offline",
    "options",
    "render",
    "socket_path",
    "spool_dir",
    "tcp_key",
    "token",
    "warnings",
]
