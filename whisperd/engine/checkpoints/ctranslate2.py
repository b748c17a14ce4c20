"""CTranslate2's ``model.bin`` as arrays under the names of transformers.

The format, versions 4 to 6: a version, the name and revision of the specification, then name, shape, type and bytes of
each variable, and the names under which some of them are known as well: equal variables are stored once. Quantised
weights have their scales beside them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whisperd.engine.checkpoints.safetensors import bfloat16_as_float32
from whisperd.errors import SourceError

Array = NDArray[Any]

VERSIONS = (4, 5, 6)
DTYPES: Mapping[int, type[np.generic]] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
BFLOAT16 = 5
SPECIFICATION = "WhisperSpec"

PARTS: Mapping[str, tuple[str, ...]] = {  # CTranslate2's part, transformers' parts; fused projections have several
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def variables(path: Path) -> dict[str, Array]:
    """Every variable by CTranslate2's name, mapped and not read; raises SourceError when there is no whole Whisper."""
    try:
        reader = _Reader(path)
        stored = dict(reader.variables())
        return stored | dict(reader.aliases(stored))
    except (struct.error, ValueError, KeyError) as error:  # what struct and numpy say where the file ends too soon
        raise SourceError(f"{path} is cut off or damaged: {error}") from error


def tensors(stored: Mapping[str, Array]) -> dict[str, Array]:
    """Variables under the names of transformers, dequantised; fused projections are split into views."""
    return dict(_named({name: _dequantised(stored, name) for name in stored}))


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = np.memmap(path, dtype=np.uint8, mode="r")
        self._at = 0

    def variables(self) -> Iterator[tuple[str, Array]]:
        version = self._number("I")
        if version not in VERSIONS:
            raise SourceError(f"{self._path} has version {version} of CTranslate2's format; expected one of {VERSIONS}")
        name, _ = self._text(), self._number("I")
        if name != SPECIFICATION:
            raise SourceError(f"{self._path} holds a {name}, expected a {SPECIFICATION}")
        for _ in range(self._number("I")):
            yield self._variable()

    def aliases(self, stored: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
        """Behind the variables; a weight's scale goes along with it."""
        for _ in range(self._number("I")):
            alias, name = self._text(), self._text()
            yield alias, stored[name]
            if f"{name}_scale" in stored:
                yield f"{alias}_scale", stored[f"{name}_scale"]

    def _variable(self) -> tuple[str, Array]:
        name = self._text()
        shape = [self._number("I") for _ in range(self._number("B"))]
        dtype = self._number("B")
        raw = self._bytes(self._number("I"))
        if dtype == BFLOAT16:
            return name, bfloat16_as_float32(raw).reshape(shape)
        if dtype not in DTYPES:
            raise SourceError(f"{self._path} has the unknown type {dtype} in {name}")
        return name, raw.view(DTYPES[dtype]).reshape(shape)

    def _bytes(self, count: int) -> NDArray[np.uint8]:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise ValueError(f"it ends before byte {self._at}")
        return self._data[start : self._at]

    def _number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self._bytes(struct.calcsize(form)).tobytes())[0])

    def _text(self) -> str:
        return self._bytes(self._number("H"))[:-1].tobytes().decode()


def _dequantised(stored: Mapping[str, Array], name: str) -> Array:
    """int8 has a scale for each row, int16 one for all: the weight is the stored number over its scale."""
    scale = stored.get(f"{name}_scale")
    if scale is None:
        return stored[name]
    weight = stored[name]
    return weight / np.asarray(scale, np.float32).reshape(-1, *[1] * (weight.ndim - 1))


def _named(stored: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    yield "model.decoder.embed_tokens.weight", stored["decoder/embeddings/weight"]
    for name, tensor in stored.items():
        side, _, rest = name.partition("/")
        if rest == "position_encodings/encodings":
            yield f"model.{side}.embed_positions.weight", tensor
        elif found := re.fullmatch(r"(conv\d|layer_norm)/(weight|bias|gamma|beta)", rest):
            yield f"model.{side}.{found[1]}.{KINDS[found[2]]}", tensor
        elif found := re.fullmatch(r"layer_(\d+)/(.+)/(weight|bias|gamma|beta)", rest):
            parts = PARTS[found[2]]
            for part, piece in zip(parts, np.split(tensor, len(parts)), strict=True):
                if not (part.endswith("k_proj") and found[3] == "bias"):  # all zeros: Whisper's keys have no bias
                    yield f"model.{side}.layers.{found[1]}.{part}.{KINDS[found[3]]}", piece
