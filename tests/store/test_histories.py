"""In random histories of a cache, the report of each reconcile is true."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.fake_origin import REPOS, FakeOrigin
from tests.support.store import store_settings
from whisperd.reference import HubSource, parse
from whisperd.store.cache import Repo
from whisperd.store.reconcile import Report, reconcile, snapshots_without_network
from whisperd.store.sources import Wanted
from whisperd.store.verify import hash_of

references = st.sampled_from(["org/a", "org/b", "org/a@dev", "org/b@dev"])


FAULTS: Mapping[str, Callable[[bytes], bytes]] = {"cut": lambda data: data[:-1], "wrong": lambda data: data[::-1]}


class Histories(RuleBasedStateMachine):
    """Configurations change, branches move, files are damaged, downloads fail; in between, reconciles."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="whisperd-test-"))
        self.origin = FakeOrigin()
        self.settings = store_settings(cache_dir=self.directory / "cache", endpoint="")
        self.wanted: list[Wanted] = []
        self.seed = 0

    @initialize()
    def publish(self) -> None:
        for name in REPOS:
            for branch in ("main", "dev"):
                self.move(name, branch)

    def teardown(self) -> None:
        shutil.rmtree(self.directory)

    @rule(name=st.sampled_from(REPOS), branch=st.sampled_from(["main", "dev"]))
    def move(self, name: str, branch: str) -> None:
        """A commit is pushed to the Hub."""
        self.seed += 1
        self.origin.commit(name, branch, self.seed)

    @rule(chosen=st.lists(references, min_size=1, max_size=3, unique=True))
    def declare(self, chosen: list[str]) -> None:
        """The configuration file is edited."""
        self.wanted = [Wanted(name=reference, source=parse(reference)) for reference in chosen]

    @rule(number=st.integers(0, 30), how=st.sampled_from(["unlink", "garbage", "truncate", "regular"]))
    def damage(self, number: int, how: str) -> None:
        """A file of the cache is removed, changed, cut off or replaced."""
        files = sorted(path for path in self.settings.cache_dir.glob("models--*/*/**/*") if not path.is_dir())
        if not files:
            return
        path = files[number % len(files)]
        data = path.read_bytes() if path.is_file() else b""
        if how != "truncate":
            path.unlink()
        if how == "garbage":
            path.write_bytes(data[::-1] + b"!")
        elif how == "truncate" and path.is_file():
            path.write_bytes(data[:-1])
        elif how == "regular":
            path.write_bytes(data)

    @rule(update=st.booleans(), force=st.booleans(), prune=st.booleans())
    def converge(self, update: bool, force: bool, prune: bool) -> None:
        """Without faults, everything is as declared afterwards, and a plan has nothing to do."""
        report = self.reconcile(update=update, force=force, prune=prune)
        assert report.exit_code == 0, report
        assert not (self.settings.cache_dir / ".whisperd/staging").exists()
        for one, result in zip(self.wanted, report.results, strict=True):
            self.assert_whole(one, result.path)
            if update and isinstance(one.source, HubSource):
                assert result.commit == self.origin.repos[one.source.repo_id].refs[one.source.revision]
        assert not self.reconcile(update=update, prune=prune, check=True).plan.pending

    @rule(name=st.sampled_from(REPOS), branch=st.sampled_from(["main", "dev"]), prune=st.booleans())
    def follow(self, name: str, branch: str, prune: bool) -> None:
        """The cache follows a pushed commit."""
        self.converge(update=False, force=False, prune=False)
        self.move(name, branch)
        self.converge(update=True, force=False, prune=prune)

    @rule(fault=st.sampled_from(["down", "cut", "wrong"]), update=st.booleans(), force=st.booleans())
    def fail(self, fault: str, update: bool, force: bool) -> None:
        """With a fault nothing is falsely reported as done, and what served before still serves."""
        before = snapshots_without_network(self.wanted, self.settings)
        self.origin.is_down, self.origin.fault = fault == "down", FAULTS.get(fault)
        report = self.reconcile(update=update, force=force, prune=True)
        self.origin.is_down, self.origin.fault = False, None
        for one, result in zip(self.wanted, report.results, strict=True):
            if result.outcome != "failed":
                self.assert_whole(one, result.path)
            elif one.name in before:
                assert result.path == before[one.name]
                self.assert_whole(one, result.path)
        if force and self.wanted:
            assert report.exit_code != 0

    @invariant()
    def refs_lead_to_whole_snapshots(self) -> None:
        """Every byte of a model that whisperd reports as servable is right."""
        for one in self.wanted:
            found = snapshots_without_network([one], self.settings)
            if found:
                self.assert_whole(one, found[one.name])

    @invariant()
    def no_snapshot_has_lost_its_blob(self) -> None:
        """A planned removal takes no declared commit and no blob of a snapshot that stays."""
        checked = replace(self.settings, check=True)
        report = reconcile(self.wanted, checked, origin=self.origin)
        kept = {(action.repo, action.to_commit) for action in report.plan.actions}
        for removal in report.plan.removals:
            assert (removal.repo, removal.commit) not in kept
            repo = Repo(self.settings.cache_dir, removal.repo)
            others = [path for path in (repo.path / "snapshots").iterdir() if path.name != removal.commit]
            gone = {other.commit for other in report.plan.removals if other.repo == removal.repo}
            links = {
                entry.readlink().name
                for path in others
                if path.name not in gone
                for entry in path.iterdir()
                if entry.is_symlink()
            }
            assert links.isdisjoint(removal.blobs)

    def reconcile(self, **changes: Any) -> Report:
        return reconcile(self.wanted, replace(self.settings, **changes), origin=self.origin)

    def assert_whole(self, one: Wanted, path: Path | None) -> None:
        assert path is not None
        assert isinstance(one.source, HubSource)
        for file in self.origin.files(one.source.repo_id, path.name):
            if file.path in ("README.md", ".gitattributes"):
                continue
            assert hash_of(path / file.path, file.hash) == file.hash


TestHistories = Histories.TestCase
TestHistories.settings = hypothesis_settings(max_examples=40, stateful_step_count=15)
