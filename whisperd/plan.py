"""Wanted and observed in, what has to be done out. Pure: applying a plan and planning again finds nothing to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from whisperd.sources import HubSource, Source, needed_files

Kind = Literal["ok", "download", "update", "repair", "blocked"]

# ``unlinked``: the bytes are in the cache, verified, but the snapshot does not lead to them.
FileState = Literal["ok", "unlinked", "missing", "wrong_size", "wrong_hash", "not_a_link"]

NEEDS_NO_BYTES = frozenset({"ok", "unlinked"})
DAMAGED = frozenset({"wrong_size", "wrong_hash", "not_a_link"})
SIGNS: Mapping[Kind, str] = {"ok": "=", "download": "+", "update": "~", "repair": "!", "blocked": "x"}
SHORT_COMMIT_CHARS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file as the Hub declares it; ``hash`` is a sha256 (64 hex digits) or the sha1 of a git blob (40)."""

    path: str
    size_bytes: int
    hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A commit and the files of it that an engine needs."""

    commit: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """One model: what it should be and what was found.

    Args:
        name: the name of the model.
        source: where its files come from.
        target: the commit it should be at; None if that could not be found out, or the source has no commits.
        current_commit: the commit that serves now, by the record or the ref of the branch.
        files: state of each file of the target, by path.
        ref_ok: whether the ref that other tools follow names the target.
        problem: why nothing can be done; empty if something can.
    """

    name: str
    source: Source
    target: Resolved | None = None
    current_commit: str | None = None
    files: Mapping[str, FileState] = field(default_factory=dict)
    ref_ok: bool = True
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What happens to one model; ``files`` are those to fetch."""

    kind: Kind
    name: str
    repo: str
    revision: str | None
    from_commit: str | None = None
    to_commit: str | None = None
    files: tuple[RemoteFile, ...] = ()
    file_count: int = 0
    reason: str = ""

    @property
    def bytes(self) -> int:
        """Bytes to fetch."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """One action for each model; ``free_bytes`` is None where nobody could say."""

    actions: tuple[Action, ...]
    free_bytes: int | None = None

    @property
    def pending(self) -> bool:
        """Whether the cache differs from what is declared."""
        return any(action.kind != "ok" for action in self.actions)

    @property
    def bytes(self) -> int:
        """Bytes to fetch for all models."""
        return sum(action.bytes for action in self.actions)

    def lines(self) -> list[str]:
        """The plan for people: a line for each model, and a summary."""
        repo_chars = max((len(action.repo) for action in self.actions), default=0)
        return [*(_line(action, repo_chars) for action in self.actions), self._summary()]

    def _summary(self) -> str:
        if not self.pending:
            return f"No changes. The cache matches the {count(len(self.actions), 'declared model')}."
        kinds = Counter(action.kind for action in self.actions)
        todo = ", ".join(f"{kinds[kind]} to {kind}" for kind in ("download", "update", "repair"))
        blocked = f", {kinds['blocked']} blocked" if kinds["blocked"] else ""
        free = "" if self.free_bytes is None else f", {size(self.free_bytes)} free"
        return f"Plan: {todo}{blocked}; {size(self.bytes)} to fetch{free}."


def select_files(files: Iterable[RemoteFile]) -> tuple[RemoteFile, ...]:
    """The files that an engine needs, of the top directory only; SourceError says what a model lacks."""
    by_path = {file.path: file for file in files}
    return tuple(by_path[path] for path in needed_files(path for path in by_path if "/" not in path))


def plan(
    states: Sequence[ModelState], *, force: bool = False, free_bytes: int | None = None, margin_bytes: int = 0
) -> CachePlan:
    """What has to be done.

    Args:
        states: every model, in the order of their declaration.
        force: fetch every file anew.
        free_bytes: room on the disk; a model that does not fit any more is blocked.
        margin_bytes: room that has to be left.
    """
    room_bytes = None if free_bytes is None else free_bytes - margin_bytes
    actions = []
    for state in states:
        action = _action(state, force)
        if room_bytes is not None and action.bytes:
            action = _within(action, room_bytes)
            room_bytes -= action.bytes
        actions.append(action)
    return CachePlan(actions=tuple(actions), free_bytes=free_bytes)


def size(size_bytes: int) -> str:
    """A number of bytes for people, in powers of ten as disks and the Hub count."""
    amount = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{size_bytes} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def count(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def short(commit: str | None) -> str:
    """A commit as people write it."""
    return (commit or "")[:SHORT_COMMIT_CHARS]


def _action(state: ModelState, force: bool) -> Action:
    repo, revision = _repo(state.source)
    action = Action(kind="ok", name=state.name, repo=repo, revision=revision, from_commit=state.current_commit)
    if state.problem:
        return replace(action, kind="blocked", reason=state.problem)
    if state.target is None:
        return replace(action, reason="complete")
    kind, reason = _verdict(state, state.target, force)
    return replace(
        action,
        kind=kind,
        to_commit=state.target.commit,
        files=tuple(_to_fetch(state, state.target, force)),
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
        return "download", "forced"
    if state.current_commit is None and not any(found in DAMAGED for found in states.values()):
        done = all(found == "ok" for found in states.values()) and state.ref_ok
        return ("ok", "complete, verified") if done else ("download", "not in the cache")
    flaws = [f"{path} {found.replace('_', ' ')}" for path, found in states.items() if found != "ok"]
    if not state.ref_ok:
        flaws.append("no ref names the commit")
    return ("repair", ", ".join(flaws)) if flaws else ("ok", "complete, verified")


def _within(action: Action, room_bytes: int) -> Action:
    if action.bytes <= room_bytes:
        return action
    reason = f"disk full: {size(action.bytes)} to fetch, room for {size(max(0, room_bytes))}"
    return replace(action, kind="blocked", files=(), reason=reason)


def _line(action: Action, repo_chars: int) -> str:
    return f"  {SIGNS[action.kind]} {action.repo:<{repo_chars}}  {_where(action)}{_what(action)}".rstrip()


def _where(action: Action) -> str:
    if action.revision is None:
        return ""
    if action.kind == "update":
        return f"{_revision(action)} {short(action.from_commit)} -> {short(action.to_commit)}  "
    commit = action.to_commit or action.from_commit
    return f"{_revision(action)}@{short(commit)}  " if commit else f"{_revision(action)}  "


def _revision(action: Action) -> str:
    """The branch or tag; a commit is not said twice."""
    return "commit" if action.revision in (action.to_commit, action.from_commit) else str(action.revision)


def _what(action: Action) -> str:
    match action.kind:
        case "ok":
            return action.reason
        case "blocked":
            return f"blocked: {action.reason}"
        case "repair":
            return f"repair: {action.reason}; {_amount(action)}"
        case "download" | "update":
            return _amount(action)


def _amount(action: Action) -> str:
    """How much is fetched: ``2 of 5 files, 484.1 MB``."""
    if not action.files:
        return "nothing to fetch"
    total = count(action.file_count, "file")
    some = len(action.files) < action.file_count
    return f"{f'{len(action.files)} of {total}' if some else total}, {size(action.bytes)}"
