"""Planning is pure: after a plan is carried out, the next plan has nothing to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.errors import SourceError
from whisperd.reference import HubSource, PathSource
from whisperd.store.plan import (
    INODES_PER_FILE,
    FileState,
    ModelState,
    RemoteFile,
    RepoContents,
    Resolved,
    Room,
    plan,
    select_files,
)
from whisperd.store.report import plan_lines
from whisperd.store.wording import count, short, size

COMMITS = ["a" * 40, "b" * 40]
FILES = tuple(RemoteFile(path=f"f{number}", size_bytes=10**number, hash=str(number) * 40) for number in range(4))
states_of_files: st.SearchStrategy[FileState] = st.sampled_from(
    ["ok", "unlinked", "wrong_link", "missing", "wrong_size", "wrong_hash", "not_a_link"]
)


@st.composite
def models(draw: st.DrawFn) -> ModelState:
    """A model in any possible state."""
    target = Resolved(commit=COMMITS[0], files=FILES)
    found: dict[str, FileState] = {file.path: draw(states_of_files) for file in FILES}
    return ModelState(
        name=draw(st.text(min_size=1, max_size=3)),
        source=HubSource(repo_id="a/b"),
        target=draw(st.sampled_from([target, target, target, None])),
        current_commit=draw(st.sampled_from([None, *COMMITS])),
        files=found,
        ref_ok=draw(st.booleans()),
        problem=draw(st.sampled_from(["", "", "", "the Hub is away"])),
    )


def applied(state: ModelState) -> ModelState:
    """The state of a model after its action was done."""
    if state.target is None:
        return state
    files: dict[str, FileState] = {file.path: "ok" for file in state.target.files}
    return replace(state, files=files, current_commit=state.target.commit, ref_ok=True)


@given(st.lists(models(), max_size=5), st.booleans())
def test_nothing_is_left_to_do(states: list[ModelState], force: bool) -> None:
    """After applying a plan, only what was blocked is still not ok."""
    first = plan(states, force=force)
    after = [
        applied(one) if action.kind != "blocked" else one for one, action in zip(states, first.actions, strict=True)
    ]
    second = plan(after)
    for before, now in zip(first.actions, second.actions, strict=True):
        assert now.kind == ("blocked" if before.kind == "blocked" else "ok")
        assert now.bytes == 0
    assert second.pending == any(action.kind == "blocked" for action in first.actions)


@given(st.lists(models(), max_size=5), st.integers(0, 3000))
def test_what_does_not_fit_is_blocked(states: list[ModelState], free_bytes: int) -> None:
    """The bytes of all actions together fit on the disk, and any plan can be printed."""
    found = plan(states, room=Room(free_bytes=free_bytes))
    assert found.bytes <= free_bytes
    assert len(plan_lines(found)) == len(states) + 1


@given(models())
def test_only_flawed_files_are_fetched(state: ModelState) -> None:
    """Correct files are never fetched, unless force asks for all of them."""
    (action,) = plan([replace(state, problem="")]).actions
    assert all(state.files[file.path] not in ("ok", "unlinked", "wrong_link") for file in action.files)
    (forced,) = plan([replace(state, problem="")], force=True).actions
    assert forced.files == (FILES if state.target else ())


def test_words() -> None:
    """The plan is printed as a list of actions with a total."""
    target = Resolved(commit=COMMITS[0], files=FILES)
    ok: dict[str, FileState] = {file.path: "ok" for file in FILES}
    states = [
        ModelState(name="new", source=HubSource(repo_id="o/new"), target=target),
        ModelState(name="kept", source=HubSource(repo_id="o/kept"), target=target, current_commit=COMMITS[0], files=ok),
        ModelState(
            name="moved",
            source=HubSource(repo_id="o/moved"),
            target=target,
            current_commit=COMMITS[1],
            files={**ok, "f3": "missing"},
        ),
        ModelState(
            name="bad",
            source=HubSource(repo_id="o/bad"),
            target=target,
            current_commit=COMMITS[0],
            files={**ok, "f1": "wrong_hash"},
        ),
        ModelState(name="dir", source=PathSource(path=Path("/m"))),
    ]
    assert plan_lines(plan(states, room=Room(free_bytes=10**9))) == [
        "  + o/new    main@aaaaaaa  4 files, 1.1 kB",
        "  = o/kept   main@aaaaaaa  complete, verified",
        "  ~ o/moved  main bbbbbbb -> aaaaaaa  1 of 4 files, 1.0 kB",
        "  ! o/bad    main@aaaaaaa  repair: f1 wrong hash; 1 of 4 files, 10 B",
        "  = path:/m  complete",
        "Plan: 1 to download, 1 to update, 1 to repair; 2.1 kB to fetch, 1.0 GB free.",
    ]


NEW = ModelState(name="new", source=HubSource(repo_id="o/new"), target=Resolved(commit=COMMITS[0], files=FILES))


@pytest.mark.parametrize(
    ("room", "reason"),
    [
        (Room(free_bytes=1110), "disk full: 1.1 kB to fetch, room for 1.1 kB"),
        (Room(free_bytes=-1), "disk full: 1.1 kB to fetch, room for 0 B"),
        (Room(free_inodes=11), "disk full: 12 inodes needed, 11 free"),
        (Room(quota_bytes=100), "over max_cache_bytes: 1.1 kB to fetch, 100 B left"),
    ],
)
def test_a_model_without_room_says_what_is_short(room: Room, reason: str) -> None:
    """Shortages of bytes, of inodes and the limit of the cache have their own messages, and nothing is fetched."""
    (action,) = plan([NEW], room=room).actions
    assert action.kind == "blocked"
    assert action.reason.startswith(reason)
    assert action.bytes == 0


@given(st.integers(0, 5), st.integers(0, 6000), st.integers(0, 60), st.integers(0, 6000))
def test_models_share_the_room(n_models: int, free_bytes: int, free_inodes: int, quota_bytes: int) -> None:
    """Space that one model takes is not available to the next: together they keep to each limit."""
    room = Room(free_bytes=free_bytes, free_inodes=free_inodes, quota_bytes=quota_bytes)
    found = plan([NEW] * n_models, room=room)
    assert found.bytes <= min(free_bytes, quota_bytes)
    assert INODES_PER_FILE * sum(len(action.files) for action in found.actions) <= free_inodes


def test_a_part_that_is_here_is_not_fetched_again() -> None:
    """Only the rest of an interrupted download counts, and a part is never more than its file."""
    state = replace(NEW, part_bytes={"f3": 900, "f0": 5})
    (action,) = plan([state], room=Room(free_bytes=210)).actions
    assert (action.total_bytes, action.bytes) == (1111, 210)


def read(name: str, n_bytes: int) -> bytes:
    raise AssertionError((name, n_bytes))


def test_files_of_a_model_are_selected() -> None:
    """An engine's files of the top directory are selected, as the Hub lists them; an incomplete model is refused."""
    names = ("config.json", "model.bin", "tokenizer.json", "onnx/model.bin", "README.md")
    files = [RemoteFile(path=name, size_bytes=1, hash="a" * 40) for name in names]
    assert [file.path for file in select_files(files, read)] == ["config.json", "model.bin", "tokenizer.json"]
    with pytest.raises(SourceError, match="no usable Whisper model"):
        select_files(files[-1:], read)


def test_what_is_not_declared_goes_with_its_own_blobs() -> None:
    """An unwanted commit that whisperd fetched is removed, with its refs and the blobs that no other snapshot has."""
    contents = RepoContents(
        repo="o/new",
        snapshots={COMMITS[0]: frozenset({"x", "y"}), COMMITS[1]: frozenset({"y", "z"})},
        refs={"main": COMMITS[0], "old": COMMITS[1]},
        blob_bytes={"z": 7},
        owned=frozenset(COMMITS),
    )
    found = plan([NEW], contents=[contents], prune=True)
    (removal,) = found.removals
    assert (removal.commit, removal.refs, removal.blobs, removal.bytes) == (COMMITS[1], ("old",), ("z",), 7)
    assert removal.reason == "superseded"
    assert found.pending
    assert plan([NEW], contents=[replace(contents, in_use=frozenset(COMMITS))]).removals == ()
    pinned = replace(NEW, source=HubSource(repo_id="o/new", revision=COMMITS[1]), target=None)
    assert [one.commit for one in plan([pinned], contents=[contents]).removals] == [COMMITS[0]]
    unknown = replace(NEW, target=None, current_commit=COMMITS[1])
    assert [one.commit for one in plan([unknown], contents=[contents]).removals] == [COMMITS[0]]
    assert {one.reason for one in plan([], contents=[contents]).removals} == {"not declared"}


def test_a_ref_that_leads_elsewhere_is_repaired() -> None:
    """A model with right files under a wrong ref is not reported as ok."""
    ok: dict[str, FileState] = {file.path: "ok" for file in FILES}
    (action,) = plan([replace(NEW, current_commit=COMMITS[0], files=ok, ref_ok=False)]).actions
    assert (action.kind, action.reason, action.bytes) == ("repair", "the ref does not name the commit", 0)


def test_words_of_numbers() -> None:
    """Sizes use powers of ten, nouns agree with their number, commits have seven digits."""
    assert [size(10**power) for power in (0, 3, 6, 9, 12, 15)] == [
        "1 B", "1.0 kB", "1.0 MB", "1.0 GB", "1.0 TB", "1000.0 TB",
    ]  # fmt: skip
    assert (count(1, "file"), count(2, "file")) == ("1 file", "2 files")
    assert (short(COMMITS[0]), short(None)) == ("a" * 7, "")
