"""Models as plain files: from one machine to another without a network, and hashes for directories."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.fake_origin import FakeOrigin
from tests.support.store import store_settings
from whisperd import errors
from whisperd.reference import parse
from whisperd.store.reconcile import Report, export, reconcile, snapshots_without_network
from whisperd.store.settings import Settings
from whisperd.store.sources import Wanted


@pytest.fixture
def origin() -> FakeOrigin:
    origin = FakeOrigin()
    origin.commit("org/a", "main", 1)
    return origin


@pytest.fixture
def here(tmp_path: Path) -> Settings:
    return store_settings(cache_dir=tmp_path / "here", endpoint="")


@pytest.fixture
def there(tmp_path: Path) -> Settings:
    return store_settings(cache_dir=tmp_path / "there", endpoint="", import_dir=tmp_path / "usb")


@pytest.fixture
def exported(origin: FakeOrigin, here: Settings, tmp_path: Path) -> Path:
    reconcile(wanted("org/a"), here, origin=origin)
    (path,) = export(wanted("org/a"), here, tmp_path / "usb")
    return path


def wanted(reference: str) -> list[Wanted]:
    return [Wanted(name="m", source=parse(reference))]


def error(report: Report) -> errors.Error:
    found = report.results[0].error
    assert found is not None
    return found


def test_there_and_back(origin: FakeOrigin, exported: Path, there: Settings) -> None:
    """An exported and imported model is the same, with its ref, and needs neither Hub nor directory afterwards."""
    report = reconcile(wanted("org/a"), there)
    assert (report.exit_code, report.results[0].outcome) == (0, "downloaded")
    assert (there.cache_dir / "models--org--a/refs/main").read_text() == origin.repos["org/a"].refs["main"]
    shutil.rmtree(exported)
    found = snapshots_without_network(wanted("org/a"), replace(there, import_dir=None))
    assert found == dict(report.snapshots)


def test_a_newer_export_is_an_update(
    origin: FakeOrigin, exported: Path, here: Settings, there: Settings, tmp_path: Path
) -> None:
    """An import moves a branch to the commit of the directory."""
    reconcile(wanted("org/a"), there)
    origin.commit("org/a", "main", 2)
    reconcile(wanted("org/a"), replace(here, update=True), origin=origin)
    assert export(wanted("org/a"), here, tmp_path / "usb") == [exported]
    report = reconcile(wanted("org/a"), there)
    assert (report.results[0].outcome, report.results[0].commit) == ("updated", origin.repos["org/a"].refs["main"])


def test_an_import_is_verified(exported: Path, there: Settings) -> None:
    """Bytes that changed on the way are refused, and nothing is reported as done."""
    data = (exported / "model.bin").read_bytes()
    (exported / "model.bin").write_bytes(data[::-1])
    assert isinstance(error(reconcile(wanted("org/a"), there)), errors.IntegrityError)
    assert snapshots_without_network(wanted("org/a"), there) == {}
    (exported / "model.bin").write_bytes(data)
    assert reconcile(wanted("org/a"), there).exit_code == 0


def test_what_is_not_there(exported: Path, there: Settings, tmp_path: Path) -> None:
    """The error for a model that was not exported lists the exported ones; a directory without models is refused."""
    assert "which has: org/a@main" in str(error(reconcile(wanted("org/b"), there)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.StoreError, match="no exported model here"):
        reconcile(wanted("org/a"), replace(there, import_dir=tmp_path / "empty"))
    (exported / "whisperd-manifest.json").write_text("{")
    with pytest.raises(errors.StoreError, match="cannot be read as a manifest"):
        reconcile(wanted("org/a"), there)


def test_only_complete_models_are_exported(here: Settings, snapshot: Path, tmp_path: Path) -> None:
    """A model that is not in the cache, or did not come from the Hub, cannot be exported."""
    for reference, words in (("org/a", "not complete"), (f"path:{snapshot}", "not from the Hub")):
        with pytest.raises(errors.StoreError, match=words):
            export(wanted(reference), here, tmp_path / "usb")


def test_a_directory_with_a_manifest(exported: Path, here: Settings) -> None:
    """An exported directory can be declared with path:, and its hashes are checked."""
    reference = f"path:{exported}"
    assert reconcile(wanted(reference), here).exit_code == 0
    data = (exported / "model.bin").read_bytes()
    (exported / "model.bin").write_bytes(data[::-1])
    assert "wrong hash" in str(error(reconcile(wanted(reference), here)))
    (exported / "model.bin").write_bytes(data[:-1])
    assert "wrong size" in str(error(reconcile(wanted(reference), here)))


def test_a_directory_with_an_empty_file(exported: Path, here: Settings) -> None:
    """An interrupted copy is detected without any manifest."""
    (exported / "whisperd-manifest.json").unlink()
    (exported / "config.json").write_bytes(b"")
    assert "config.json is empty" in str(error(reconcile(wanted(f"path:{exported}"), here)))


def test_a_package_whose_files_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Settings) -> None:
    """The model of a package is checked against the hashes that pip has recorded."""
    import base64
    import hashlib

    site, model = tmp_path / "site", tmp_path / "site/some_models/m"
    model.mkdir(parents=True)
    (site / "some_models/__init__.py").touch()
    lines = []
    for name in ("config.json", "model.bin", "tokenizer.json"):
        (model / name).write_bytes(name.encode())
        digest = base64.urlsafe_b64encode(hashlib.sha256(name.encode()).digest()).decode().rstrip("=")
        lines.append(f"some_models/m/{name},sha256={digest},{len(name)}")
    info = site / "some_models-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-models\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("some_models\n")
    (info / "RECORD").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(site)
    assert reconcile(wanted("package:some_models/m"), here).exit_code == 0
    (model / "model.bin").write_bytes(b"nib.ledom")
    assert "wrong hash" in str(error(reconcile(wanted("package:some_models/m"), here)))


def test_a_manifest_is_for_people(exported: Path) -> None:
    """The manifest describes the directory to a reader."""
    found = json.loads((exported / "whisperd-manifest.json").read_text())
    assert (found["version"], found["repo"], found["revision"]) == (1, "org/a", "main")
    assert {file["path"] for file in found["files"]} == {
        path.name for path in exported.iterdir() if path.name != "whisperd-manifest.json"
    }
