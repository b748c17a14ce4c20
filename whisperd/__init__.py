"""whisperd: speech models declared in one file, kept true on disk, and served in batches from one socket."""

from __future__ import annotations

__version__ = "0.1.0"
