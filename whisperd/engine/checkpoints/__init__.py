"""Reads a model directory in either format, and converts it: ``read`` for arrays, ``converted`` for CTranslate2."""

from whisperd.engine.checkpoints.convert import converted
from whisperd.engine.checkpoints.reader import Checkpoint, Shape, read

__all__ = ["Checkpoint", "Shape", "converted", "read"]
