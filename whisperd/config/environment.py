"""Values that follow from the environment where whisperd.toml has none, by the variables of the Hugging Face tools.

Pure functions of a mapping. An empty variable counts as not set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from whisperd.config.options import Config, hub_address
from whisperd.errors import ConfigError, Problem

HUB = "https://huggingface.co"
CACHE_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE")
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
TRUE_WORDS = frozenset({"1", "on", "yes", "true"})  # huggingface_hub.constants.ENV_VARS_TRUE_VALUES
SOCKET_NAME = "whisperd.sock"


def home(environ: Mapping[str, str]) -> Path:
    """The home directory; ``/`` for a service that has none."""
    return Path(environ.get("HOME") or "/")


def expand(text: str, environ: Mapping[str, str]) -> Path:
    """Replaces a leading ``~`` by the home directory."""
    return home(environ) / text[2:] if text == "~" or text.startswith("~/") else Path(text)


def cache_dir(config: Config, environ: Mapping[str, str]) -> Path:
    """The Hugging Face cache. Two of the variables are former ones, which huggingface_hub no longer reads."""
    return _cache_dir(config, environ)[0]


def cache_dir_origin(config: Config, environ: Mapping[str, str]) -> str:
    """What set the cache: ``cache_dir``, a variable, or ``default``."""
    return _cache_dir(config, environ)[1]


def endpoint(config: Config, environ: Mapping[str, str]) -> str:
    """Address of the Hub without a slash at the end; raises ConfigError for a variable that is no address."""
    if config.reconcile.endpoint:
        return config.reconcile.endpoint
    try:
        return hub_address(environ.get("HF_ENDPOINT") or HUB)
    except ValueError as error:
        raise ConfigError(Problem(where="$HF_ENDPOINT", key="", message=str(error))) from error


def offline(config: Config, environ: Mapping[str, str]) -> bool:
    """True if the Hub must not be asked."""
    return config.reconcile.offline or offline_variable(environ) is not None


def offline_variable(environ: Mapping[str, str]) -> str | None:
    """The name of the variable that forbids the Hub; it overrules the file."""
    return next((name for name in OFFLINE_VARIABLES if environ.get(name, "").lower() in TRUE_WORDS), None)


def socket_path(config: Config, environ: Mapping[str, str], *, uid: int) -> Path:
    """The socket of this user's daemon, unless systemd passes one."""
    if chosen := config.server.socket or environ.get("WHISPERD_SOCKET"):
        return expand(chosen, environ)
    if directories := environ.get("RUNTIME_DIRECTORY"):
        return Path(directories.partition(":")[0]) / SOCKET_NAME
    if uid == 0:
        return Path("/run") / SOCKET_NAME  # as systemd/whisperd.socket has it
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "whisperd" / SOCKET_NAME
    return Path(f"/tmp/whisperd-{uid}") / SOCKET_NAME  # noqa: S108 - whoever binds makes this directory its own


def spool_dir(config: Config, environ: Mapping[str, str]) -> Path:
    """The directory of uploads. Not ``/tmp``, which is often in memory."""
    return expand(config.server.spool_dir or "/var/tmp", environ)  # noqa: S108 - files there are made without a name


def _first_set(names: Iterable[str], environ: Mapping[str, str]) -> str | None:
    return next((name for name in names if environ.get(name)), None)


def _cache_dir(config: Config, environ: Mapping[str, str]) -> tuple[Path, str]:
    if config.cache_dir:
        return expand(config.cache_dir, environ), "cache_dir"
    if name := _first_set(CACHE_VARIABLES, environ):
        return expand(environ[name], environ), f"${name}"
    path, origin = hf_home(environ)
    return path / "hub", origin


def hf_home(environ: Mapping[str, str]) -> tuple[Path, str]:
    """The directory of the Hugging Face tools, and what named it."""
    if given := environ.get("HF_HOME"):
        return expand(given, environ), "$HF_HOME"
    if given := environ.get("XDG_CACHE_HOME"):
        return expand(given, environ) / "huggingface", "$XDG_CACHE_HOME"
    return home(environ) / ".cache/huggingface", "default"
