"""Prune removes only what whisperd has fetched, only when asked, and never what is in use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fake_origin import REPOS, FakeOrigin
from tests.support.store import store_settings
from whisperd.reference import parse
from whisperd.store.plan import RepoContents, removed_from
from whisperd.store.reconcile import Report, hold, reconcile
from whisperd.store.report import plan_lines
from whisperd.store.settings import Settings
from whisperd.store.sources import Wanted

COMMITS = [letter * 40 for letter in "abcd"]
BLOBS = [str(number) * 64 for number in range(6)]


@pytest.fixture
def origin() -> FakeOrigin:
    origin = FakeOrigin()
    for seed, name in enumerate(REPOS):
        origin.commit(name, "main", seed)
    return origin


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return store_settings(cache_dir=tmp_path / "cache", endpoint="")


def run(origin: FakeOrigin, settings: Settings, references: Sequence[str], **changes: Any) -> Report:
    wanted = [Wanted(name=reference, source=parse(reference)) for reference in references]
    return reconcile(wanted, replace(settings, **changes), origin=origin)


def repos(settings: Settings) -> set[str]:
    return {path.name for path in settings.cache_dir.glob("models--*")}


@given(
    snapshots=st.dictionaries(st.sampled_from(COMMITS), st.frozensets(st.sampled_from(BLOBS)), max_size=4),
    owned=st.frozensets(st.sampled_from(COMMITS)),
    in_use=st.frozensets(st.sampled_from(COMMITS)),
    wanted=st.frozensets(st.sampled_from(COMMITS)),
)
def test_no_kept_snapshot_loses_a_blob(
    snapshots: dict[str, frozenset[str]], owned: frozenset[str], in_use: frozenset[str], wanted: frozenset[str]
) -> None:
    """Removed files are owned, unwanted and unused, and the others are unchanged, whatever the repository holds."""
    contents = RepoContents(repo="o/n", snapshots=snapshots, owned=owned, in_use=in_use)
    removals = removed_from(contents, {("o/n", commit): frozenset[str]() for commit in wanted})
    gone = {removal.commit for removal in removals}
    assert gone == (owned & snapshots.keys()) - in_use - wanted
    kept = {blob for commit, blobs in snapshots.items() if commit not in gone for blob in blobs}
    removed = [blob for removal in removals for blob in removal.blobs]
    assert kept.isdisjoint(removed)
    assert len(removed) == len(set(removed))
    assert {blob for blobs in snapshots.values() for blob in blobs} == kept | set(removed)


def test_only_when_asked(origin: FakeOrigin, settings: Settings) -> None:
    """A model that is no longer declared is named in the plan, kept, and removed as a whole by --prune."""
    run(origin, settings, REPOS)
    told = run(origin, settings, REPOS[:1])
    assert told.exit_code == 0
    assert plan_lines(told.plan)[1].endswith("not declared, 902 B (kept; --prune removes it)")
    assert len(repos(settings)) == 2
    checked = run(origin, settings, REPOS[:1], prune=True, check=True)
    assert (checked.exit_code, len(repos(settings))) == (3, 2)
    assert plan_lines(checked.plan)[1:] == [
        f"  - org/b  {origin.repos['org/b'].refs['main'][:7]}  not declared, 902 B",
        plan_lines(checked.plan)[2],
    ]
    assert "1 to remove" in plan_lines(checked.plan)[2]
    done = run(origin, settings, REPOS[:1], prune=True)
    assert "1 removed" in done.lines()[-1]
    assert repos(settings) == {"models--org--a"}
    assert run(origin, settings, REPOS[:1], prune=True, check=True).exit_code == 0


def test_the_generation_before(origin: FakeOrigin, settings: Settings) -> None:
    """After an update the old commit can be removed; files that both share stay."""
    old = run(origin, settings, ["org/a"]).results[0].path
    origin.commit("org/a", "main", 7)
    report = run(origin, settings, ["org/a"], update=True, prune=True)
    new = report.results[0].path
    assert old is not None
    assert new is not None
    assert not old.exists()
    assert all(entry.exists() for entry in new.iterdir())
    assert run(origin, settings, ["org/a"], update=True, prune=True, check=True).exit_code == 0


def test_an_update_that_fails_keeps_the_old(origin: FakeOrigin, settings: Settings) -> None:
    """The snapshot that a model still uses is not removed, though the plan listed it."""
    old = run(origin, settings, ["org/a"]).results[0].path
    origin.commit("org/a", "main", 7)
    origin.fault = lambda data: data[::-1]
    report = run(origin, settings, ["org/a"], update=True, prune=True)
    assert report.exit_code == 1
    assert report.removed == ()
    assert old is not None
    assert old.exists()


def test_not_what_others_have_fetched(origin: FakeOrigin, settings: Settings) -> None:
    """A snapshot that existed before whisperd is served, and never removed."""
    run(origin, settings, REPOS)
    (settings.cache_dir / "whisperd.lock").unlink()  # now everything looks as if another tool had fetched it
    assert run(origin, settings, REPOS).exit_code == 0
    report = run(origin, settings, REPOS[:1], prune=True)
    assert (report.removed, len(repos(settings))) == ((), 2)


def test_not_what_is_in_use(origin: FakeOrigin, settings: Settings) -> None:
    """A snapshot that a process holds is kept until it is released."""
    paths = run(origin, settings, REPOS).snapshots
    handle = hold(paths["org/b"])
    assert handle is not None
    assert run(origin, settings, REPOS[:1], prune=True).removed == ()
    os.close(handle)
    assert [removal.repo for removal in run(origin, settings, REPOS[:1], prune=True).removed] == ["org/b"]
    assert hold(paths["org/b"]) is None
