"""Planning is pure: doing what a plan says leaves nothing to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from whisperd.reference import HubSource, PathSource
from whisperd.store.plan import FileState, ModelState, RemoteFile, Resolved, Room, plan
from whisperd.store.report import plan_lines

COMMITS = ["a" * 40, "b" * 40]
FILES = tuple(RemoteFile(path=f"f{number}", size_bytes=10**number, hash=str(number) * 40) for number in range(4))
states_of_files: st.SearchStrategy[FileState] = st.sampled_from(
    ["ok", "unlinked", "missing", "wrong_size", "wrong_hash", "not_a_link"]
)


@st.composite
def models(draw: st.DrawFn) -> ModelState:
    """A model in any state that can be met."""
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
    """What a model is after its action was done."""
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
    """The bytes of all actions together fit on the disk, and lines can be printed for any plan."""
    found = plan(states, room=Room(free_bytes=free_bytes))
    assert found.bytes <= free_bytes
    assert len(plan_lines(found)) == len(states) + 1


@given(models())
def test_only_flawed_files_are_fetched(state: ModelState) -> None:
    """Files that are there and right are never fetched, unless everything is asked for anew."""
    (action,) = plan([replace(state, problem="")]).actions
    assert all(state.files[file.path] not in ("ok", "unlinked") for file in action.files)
    (forced,) = plan([replace(state, problem="")], force=True).actions
    assert forced.files == (FILES if state.target else ())


def test_words() -> None:
    """The plan reads like a list of what will happen, with a sum."""
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
