"""whisperd: speech models declared in one file, kept true on disk, and served in batches from one socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whisperd.version import VERSION as __version__

if TYPE_CHECKING:
    from whisperd.store.download import download_model_if_needed

__all__ = ["__version__", "download_model_if_needed"]


def __getattr__(name: str) -> object:
    """Names that cost an import when they are used, and nothing before."""
    if name == "download_model_if_needed":
        from whisperd.store.download import download_model_if_needed

        return download_model_if_needed
    raise AttributeError(f"module 'whisperd' has no attribute {name!r}")
