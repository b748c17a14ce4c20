"""The version of the program; the package metadata and the changelog are held equal to it by a test."""

from __future__ import annotations

VERSION = "0.1.0"
