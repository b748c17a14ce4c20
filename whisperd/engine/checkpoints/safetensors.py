"""A Hugging Face snapshot without torch: its safetensors as arrays, its JSON files, and the format of a directory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whisperd.errors import SourceError

Tensors = Mapping[str, NDArray[Any]]

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
BFLOAT16 = "BF16"
# How files of torch.save begin: a zip archive, or in older releases a pickle.
PYTORCH = (b"PK\x03\x04", b"\x80\x02")
BLANK_TOKEN = 220  # a lone space: never the first token of a text, in every release of Whisper


def is_ctranslate2(snapshot: Path) -> bool:
    """True for a directory that CTranslate2 loads as it is; beside safetensors, a model.bin may be PyTorch's."""
    path = snapshot / "model.bin"
    return path.is_file() and not (weight_files(snapshot) and _is_pytorch(path))


def is_huggingface(snapshot: Path) -> bool:
    """True for a directory in the layout of transformers, with safetensors weights."""
    return (snapshot / "config.json").is_file() and bool(weight_files(snapshot))


def weight_files(snapshot: Path) -> list[Path]:
    """The safetensors files of a snapshot: one, or the shards that the index names; empty where there are none.

    Raises SourceError if the index is none.
    """
    whole, index = snapshot / "model.safetensors", snapshot / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else sorted(snapshot.glob("model-*-of-*.safetensors"))
    shards = json_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) and "/" not in name for name in shards.values()):
        raise SourceError(f"{index} is no index of weights: expected the names of files beside it")
    return [snapshot / name for name in sorted(set(shards.values()))]


def _is_pytorch(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(PYTORCH[0])).startswith(PYTORCH)


def tensors(snapshot: Path) -> dict[str, NDArray[Any]]:
    """All tensors of a Hugging Face snapshot by name, mapped and not read; raises SourceError."""
    return {name: tensor for path in weight_files(snapshot) for name, tensor in _safetensors(path)}


def _safetensors(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Tensors by name, mapped and not read; bfloat16, which numpy lacks, becomes float32.

    The format: 8 bytes of length, a JSON header of that length, raw little-endian data.
    """
    data = np.memmap(path, dtype=np.uint8, mode="r")
    length = int(data[:8].view("<u8")[0]) if len(data) >= 8 else len(data)
    if length > len(data) - 8:
        raise SourceError(f"{path} is not a safetensors file, or cut off")
    header = json.loads(data[8 : 8 + length].tobytes())
    body = data[8 + length :]
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            if end > len(body):
                raise SourceError(f"{path} is cut off in tensor {name}")
            yield name, _typed(body[start:end], entry["dtype"], path).reshape(entry["shape"])


def bfloat16_as_float32(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """bfloat16 is the upper half of a float32; numpy has no type for it."""
    widened: NDArray[np.float32] = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return widened


def _typed(raw: NDArray[np.uint8], dtype: str, path: Path) -> NDArray[Any]:
    if dtype == BFLOAT16:
        return bfloat16_as_float32(raw)
    if dtype not in DTYPES:
        raise SourceError(f"{path} holds tensors of type {dtype}; expected one of {', '.join([*DTYPES, BFLOAT16])}")
    return raw.view(DTYPES[dtype])


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file; raises SourceError."""
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(path.read_bytes())
    except ValueError as error:
        raise SourceError(f"{path} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise SourceError(f"{path} holds no JSON object")
    return parsed
