"""The weights in an ONNX file, read without the library ``onnx``: a file is nested protobuf messages.

Format: ``onnx.proto`` of https://github.com/onnx/onnx. Only what networks exported by PyTorch hold is read: float32
arrays that lie in the file itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from whisperd.errors import SourceError
from whisperd.speech.units import Floats

GRAPH, INITIALIZER = 7, 5  # of a model, of its graph
DIMS, DATA_TYPE, NAME, RAW_DATA = 1, 2, 8, 9  # of a tensor
FLOAT32 = 1
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def initializers(model: bytes) -> dict[str, Floats]:
    """The named arrays of the graph; raises SourceError when the file is damaged or holds another kind of array."""
    try:
        graphs = [value for key, value in _fields(model) if key == GRAPH and isinstance(value, bytes)]
        stored = [value for graph in graphs for key, value in _fields(graph) if key == INITIALIZER]
        return dict(_array(value) for value in stored if isinstance(value, bytes))
    except (IndexError, ValueError) as error:
        raise SourceError(f"this is not an ONNX file with float32 weights: {error}") from error


def _array(tensor: bytes) -> tuple[str, Floats]:
    sizes, name, data, data_type = [], "", b"", 0
    for key, value in _fields(tensor):
        if isinstance(value, int):
            sizes += [value] if key == DIMS else []
            data_type = value if key == DATA_TYPE else data_type
        else:
            name = value.decode() if key == NAME else name
            data = value if key == RAW_DATA else data
    if data_type != FLOAT32 or len(data) != 4 * math.prod(sizes):
        raise ValueError(f"{name!r} has type {data_type} and {len(data)} bytes for the sizes {sizes}")
    return name, np.frombuffer(data, "<f4").reshape(sizes).astype(np.float32)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values, in order; numbers of fixed size are given as bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == BYTES:
            length, at = _varint(message, at)
        elif kind in {FIXED32, FIXED64}:
            length = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"unknown kind of field: {kind}")
        if at + length > len(message):
            raise ValueError("the file is cut off")
        yield tag >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits to a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
