"""How the cache is reconciled, and how that follows from the configuration and the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from whisperd import config as declared
from whisperd.config import Config
from whisperd.store.sources import Wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to reconcile. The fields without a default are options of the configuration, which declares their defaults.

    Attributes:
        cache_dir: the Hugging Face cache.
        endpoint: address of the Hub, without a slash at the end.
        token: for the Hub.
        offline: the Hub is never asked.
        force: every file is fetched anew.
        verify: every file is hashed.
        metadata_timeout_s: how long the Hub may take to answer.
        stall_timeout_s: a download that brings fewer than 1 kB/s on average for this long is given up.
        parallel: so many models are fetched at the same time.
        prune: what whisperd has fetched and the configuration does not declare is removed.
        max_cache_bytes: all blobs of the cache together stay below this; 0: no limit.
        check: only the plan is made.
        update: branches move to their newest commit.
        import_dir: files are taken from this directory in place of the Hub.
        retry_wait_s: pause before the second try; each further pause is twice as long.
        lock_timeout_s: another reconcile on the same cache is waited for as long as it makes some progress within this
            time; 0: not at all.
    """

    cache_dir: Path
    endpoint: str
    token: str | None = field(default=None, repr=False)
    offline: bool
    force: bool
    verify: bool
    metadata_timeout_s: float
    stall_timeout_s: float
    parallel: int
    prune: bool
    max_cache_bytes: int
    check: bool = False
    update: bool = False
    import_dir: Path | None = None
    retry_wait_s: float = 1.0
    lock_timeout_s: float = 600.0

    @classmethod
    def from_config(cls, config: Config, environ: Mapping[str, str], given: declared.Token | None = None) -> Settings:
        """The settings that a configuration and an environment declare together; a ``given`` token comes first.

        Raises ConfigError for a variable or a token that cannot be used.
        """
        token = given or declared.token(environ)
        followed = {
            "cache_dir": declared.cache_dir(config, environ),
            "endpoint": declared.endpoint(config, environ),
            "token": token.value if token else None,
            "offline": declared.offline(config, environ),
            "force": config.force,
        }
        return cls(**{**dict(config.reconcile), **followed})


def declared_models(config: Config) -> tuple[Wanted, ...]:
    """The declared models, the default one first."""
    return tuple(Wanted(name=model.served_name, source=model.source) for model in config.models)
