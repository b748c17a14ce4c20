"""Wanted and observed in, what has to be done out. Pure: applying a plan and planning again finds nothing to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from whisperd.reference import HubSource, Source
from whisperd.store.sources import Read, needed_files
from whisperd.store.wording import MAKE_ROOM, count, short, size

Kind = Literal["ok", "download", "update", "repair", "blocked"]

# ``unlinked`` and ``wrong_link``: the bytes are in the cache, verified, but the entry of the snapshot is missing, or
# leads somewhere else.
FileState = Literal["ok", "unlinked", "wrong_link", "missing", "wrong_size", "wrong_hash", "not_a_link"]

NEEDS_NO_BYTES = frozenset({"ok", "unlinked", "wrong_link"})
DAMAGED = frozenset({"wrong_size", "wrong_hash", "not_a_link", "wrong_link"})
INODES_PER_FILE = 3  # a blob, the link to it, and now and then a directory
FORCED = "forced"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file as the Hub declares it; ``hash`` is a sha256 (64 hex digits) or the sha1 of a git blob (40)."""

    path: str
    size_bytes: int
    hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A commit and the files of it that an engine needs.

    ``repo`` is the name by which the Hub calls the repository, where it said so.
    """

    commit: str
    files: tuple[RemoteFile, ...]
    repo: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What the disk can still take; None where nobody could say, or where nothing is set.

    ``quota_bytes`` is what is left of ``max_cache_bytes``.
    """

    free_bytes: int | None = None
    free_inodes: int | None = None
    quota_bytes: int | None = None

    def refusal(self, action: Action) -> str:
        """Why the files of an action do not fit; empty if they do. Old and new files are there together for a while."""
        n_inodes = INODES_PER_FILE * len(action.files)
        if self.free_bytes is not None and action.bytes > self.free_bytes:
            return f"disk full: {size(action.bytes)} to fetch, room for {size(max(0, self.free_bytes))}; {MAKE_ROOM}"
        if self.free_inodes is not None and n_inodes > self.free_inodes:
            return f"disk full: {count(n_inodes, 'inode')} needed, {max(0, self.free_inodes)} free; {MAKE_ROOM}"
        if self.quota_bytes is not None and action.bytes > self.quota_bytes:
            left = size(max(0, self.quota_bytes))
            return f"over max_cache_bytes: {size(action.bytes)} to fetch, {left} left; raise it, or --prune"
        return ""

    def without(self, action: Action) -> Room:
        """What is left when the action was done."""
        return Room(
            free_bytes=None if self.free_bytes is None else self.free_bytes - action.bytes,
            free_inodes=None if self.free_inodes is None else self.free_inodes - INODES_PER_FILE * len(action.files),
            quota_bytes=None if self.quota_bytes is None else self.quota_bytes - action.bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoContents:
    """One repository of the cache as it lies on the disk.

    Args:
        repo: ``owner/name``.
        snapshots: the blobs that each commit leads to.
        refs: branch or tag to commit.
        blob_bytes: size of each blob.
        owned: commits that whisperd itself has fetched.
        in_use: commits that a running daemon serves.
    """

    repo: str
    snapshots: Mapping[str, frozenset[str]]
    refs: Mapping[str, str] = field(default_factory=dict)
    blob_bytes: Mapping[str, int] = field(default_factory=dict)
    owned: frozenset[str] = frozenset()
    in_use: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """A commit that nobody declares any more, with the refs and blobs that go with it."""

    repo: str
    commit: str
    refs: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()
    bytes: int = 0
    reason: Literal["not declared", "superseded"] = "not declared"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """One model: what it should be and what was found.

    Args:
        name: the name of the model.
        source: where its files come from.
        target: the commit it should be at; None if that could not be found out, or the source has no commits.
        current_commit: the commit that serves now, by the record or the ref of the branch.
        files: state of each file of the target, by path.
        part_bytes: what an earlier, broken off download has left of a file, by path.
        ref_ok: whether the ref that other tools follow names the target.
        problem: why nothing can be done; empty if something can.
    """

    name: str
    source: Source
    target: Resolved | None = None
    current_commit: str | None = None
    files: Mapping[str, FileState] = field(default_factory=dict)
    part_bytes: Mapping[str, int] = field(default_factory=dict)
    ref_ok: bool = True
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What happens to one model; ``files`` are those to fetch, of which ``part_bytes`` are here already."""

    kind: Kind
    name: str
    repo: str
    revision: str | None
    from_commit: str | None = None
    to_commit: str | None = None
    files: tuple[RemoteFile, ...] = ()
    file_count: int = 0
    part_bytes: int = 0
    reason: str = ""

    @property
    def total_bytes(self) -> int:
        """Size of what is fetched; files with the same content are fetched once."""
        return sum(file.size_bytes for file in contents_of(self.files))

    @property
    def bytes(self) -> int:
        """Bytes to fetch."""
        return self.total_bytes - self.part_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """One action for each model, and what is not declared any more; that goes only with ``prune``.

    ``free_bytes`` is None where nobody could say.
    """

    actions: tuple[Action, ...]
    removals: tuple[Removal, ...] = ()
    prune: bool = False
    free_bytes: int | None = None

    @property
    def pending(self) -> bool:
        """Whether the cache differs from what is declared."""
        return any(action.kind != "ok" for action in self.actions) or (self.prune and bool(self.removals))

    @property
    def bytes(self) -> int:
        """Bytes to fetch for all models."""
        return sum(action.bytes for action in self.actions)


def contents_of(files: Iterable[RemoteFile]) -> tuple[RemoteFile, ...]:
    """One file for each content, in order."""
    return tuple({file.hash: file for file in reversed(tuple(files))}.values())[::-1]


def select_files(files: Iterable[RemoteFile], read: Read) -> tuple[RemoteFile, ...]:
    """The files that an engine needs, of the top directory only; SourceError says what a model lacks."""
    by_path = {file.path: file for file in files}
    return tuple(by_path[path] for path in needed_files([path for path in by_path if "/" not in path], read))


def plan(
    states: Sequence[ModelState],
    *,
    force: bool = False,
    room: Room | None = None,
    contents: Sequence[RepoContents] = (),
    prune: bool = False,
) -> CachePlan:
    """What has to be done.

    Args:
        states: every model, in the order of their declaration.
        force: fetch every file anew.
        room: what the disk can take; a model that does not fit any more is blocked.
        contents: the repositories in which whisperd has something that may be no longer wanted.
        prune: remove that.
    """
    room = room or Room()
    left, actions = room, []
    for state in states:
        action = _action(state, force)
        if action.files and (reason := left.refusal(action)):
            action = replace(action, kind="blocked", files=(), part_bytes=0, reason=reason)
        left = left.without(action)
        actions.append(action)
    wanted: dict[tuple[str, str], frozenset[str]] = {}
    for state in states:
        for pair, blobs in _wanted(state):
            wanted[pair] = wanted.get(pair, frozenset()) | blobs
    removals = tuple(removal for repo in contents for removal in removed_from(repo, wanted))
    return CachePlan(actions=tuple(actions), removals=removals, prune=prune, free_bytes=room.free_bytes)


def removed_from(contents: RepoContents, wanted: Mapping[tuple[str, str], frozenset[str]]) -> tuple[Removal, ...]:
    """The commits of a repository that can go: fetched by whisperd, not wanted, not in use.

    A blob goes with the last snapshot that leads to it, whoever has made that snapshot; ``wanted``, the blobs by
    repository and commit, may name snapshots that are still to be made.
    """
    doomed = sorted(
        commit
        for commit in contents.owned & contents.snapshots.keys()
        if (contents.repo, commit) not in wanted and commit not in contents.in_use
    )
    kept = {blob for commit, blobs in contents.snapshots.items() if commit not in doomed for blob in blobs}
    kept |= {blob for (repo, _), blobs in wanted.items() if repo == contents.repo for blob in blobs}
    removals = []
    for commit in doomed:
        blobs = tuple(sorted(contents.snapshots[commit] - kept))
        kept.update(blobs)  # gone with this one
        removals.append(
            Removal(
                repo=contents.repo,
                commit=commit,
                refs=tuple(sorted(ref for ref, named in contents.refs.items() if named == commit)),
                blobs=blobs,
                bytes=sum(contents.blob_bytes.get(blob, 0) for blob in blobs),
                reason="superseded" if any(repo == contents.repo for repo, _ in wanted) else "not declared",
            )
        )
    return tuple(removals)


def _action(state: ModelState, force: bool) -> Action:
    repo, revision = _repo(state.source)
    action = Action(kind="ok", name=state.name, repo=repo, revision=revision, from_commit=state.current_commit)
    if state.problem:
        return replace(action, kind="blocked", reason=state.problem)
    if state.target is None:
        return replace(action, reason="complete")
    kind, reason = _verdict(state, state.target, force)
    files = tuple(_to_fetch(state, state.target, force))
    return replace(
        action,
        kind=kind,
        to_commit=state.target.commit,
        files=files,
        part_bytes=sum(min(state.part_bytes.get(file.path, 0), file.size_bytes) for file in contents_of(files)),
        file_count=len(state.target.files),
        reason=reason,
    )


def _repo(source: Source) -> tuple[str, str | None]:
    return (source.repo_id, source.revision) if isinstance(source, HubSource) else (str(source), None)


def _to_fetch(state: ModelState, target: Resolved, force: bool) -> Iterable[RemoteFile]:
    return (file for file in target.files if force or _state_of(state, file) not in NEEDS_NO_BYTES)


def _state_of(state: ModelState, file: RemoteFile) -> FileState:
    return state.files.get(file.path, "missing")


def _verdict(state: ModelState, target: Resolved, force: bool) -> tuple[Kind, str]:
    """What sort of work it is, and why."""
    states = {file.path: _state_of(state, file) for file in target.files}
    if state.current_commit not in (None, target.commit):
        return "update", f"{short(state.current_commit)} -> {short(target.commit)}"
    if force:
        return "download", FORCED
    if state.current_commit is None and not any(found in DAMAGED for found in states.values()):
        done = all(found == "ok" for found in states.values()) and state.ref_ok
        return ("ok", "complete, verified") if done else ("download", "not in the cache")
    flaws = [f"{path} {found.replace('_', ' ')}" for path, found in states.items() if found != "ok"]
    if not state.ref_ok:
        flaws.append("the ref does not name the commit")
    return ("repair", ", ".join(flaws)) if flaws else ("ok", "complete, verified")


def _wanted(state: ModelState) -> Iterator[tuple[tuple[str, str], frozenset[str]]]:
    """The commits that a model needs, with their blobs: its target; while that is unknown, what it has."""
    if not isinstance(state.source, HubSource):
        return
    if state.source.is_pinned:
        yield (state.source.repo_id, state.source.revision), frozenset()
    if state.target is not None:
        yield (state.source.repo_id, state.target.commit), frozenset(file.hash for file in state.target.files)
    elif state.current_commit is not None:
        yield (state.source.repo_id, state.current_commit), frozenset()
