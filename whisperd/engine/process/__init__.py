"""An engine in a process of its own: only the end of a process heals a broken GPU, and gives all of its memory back."""

from whisperd.engine.process.engine import ChildEngine

__all__ = ["ChildEngine"]
